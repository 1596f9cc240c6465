%% @doc A store of KV files in one directory: the host that is built in.
%%
%% It gives the writer what a save needs (key, reservation, root) and everybody else loading,
%% deleting, looking and eviction of what was not used for longest. Loads and saves run in the
%% process that calls; the server watches over reservations and, in a bounded store, over room.
%%
%% The index is an ETS table of the store's name, one row for each key: read without the server,
%% made from the files' headers when the store starts. The files are the truth and the index only
%% remembers them: several nodes may share a root, and a load finds what another node has saved.
-module(erllama_cache_store).
-behaviour(erllama_cache_host).

-include("erllama_cache_index.hrl").
-include("erllama_cache_store.hrl").

-export([start_link/2, child_spec/2]).
-export([load/2, delete/2, info/1, key/1, is_store/1]).
-export([identify/1, reserve/4, root/1, check/3, mark_published/4, announce/6, cancel/3, count/2]).
-export_type([name/0, options/0, file_info/0, info/0]).

-type name() :: atom().
-type options() :: #{
    root := file:name_all(),
    tier => erllama_cache_host:tier(),
    max_bytes => pos_integer() | infinity,
    mac_key => {file, file:name_all()} | fun(() -> <<_:256>>)
}.
%% The directory, which must exist; what kind of store it is (default `disk'); how many bytes its
%% files may take together (default `infinity'); the secret that the writer's digests are keyed with
%% (default: `mac_key' of the application's environment, or none): with one, a file without such a
%% digest is as good as none.

-type file_info() :: #{
    save_reason := erllama_cache_meta:save_reason(),
    quant_bits := byte(),
    quant_type := atom(),
    quant_byte := byte(),
    fingerprint := <<_:256>>,
    fingerprint_mode := erllama_cache_meta:fingerprint_mode(),
    ctx_params_hash := <<_:256>>,
    tokens := <<_:_*32>>,
    context_size := non_neg_integer(),
    creation_time := non_neg_integer(),
    last_used_time := non_neg_integer(),
    hit_count := non_neg_integer(),
    prompt_text := binary(),
    hostname := binary(),
    erllama_version := binary(),
    save_reason_detail := binary(),
    file_size := pos_integer()
}.
%% What was saved beside a payload, under the keys of the `build_meta' map; last use and hits as
%% they were before this load. `quant_type' is `undefined' for a byte that stands for no known type.
%% The tokens are as in the file, four bytes each, `[T || <<T:32/little>> <= Tokens]': who loads a
%% prompt of many knows them, and a list of them would be garbage on the heap of a process that is
%% to decode the next one.

-type info() :: #{
    name := name(),
    root := file:name_all(),
    tier := erllama_cache_host:tier(),
    max_bytes := pos_integer() | infinity,
    files := non_neg_integer(),
    bytes := non_neg_integer(),
    reservations := non_neg_integer(),
    saves := non_neg_integer(),
    duplicates := non_neg_integer(),
    hits := non_neg_integer(),
    misses := non_neg_integer(),
    refused := non_neg_integer(),
    evictions := non_neg_integer()
}.

%% For so many milliseconds a reservation in an unbounded store is watched by a timer alone, which
%% tells the server of it: most saves have ended by then, and those wake no server.
-define(UNWATCHED, 50).
%% Seconds between two notes of use in one file.
-define(NOTE_EVERY, 3600).
%% The quant byte of all types that the table does not name.
-define(NO_KNOWN_TYPE, 255).

%% Bytes that are hashed within half a millisecond on any processor.
-define(FEW_TOKENS, 131072).

-define(IS_KEY(Key), (is_binary(Key) andalso byte_size(Key) =:= 32)).

%%% Starting

%% @doc Starts a store. Its name is what {@link erllama_cache_writer:save/4} takes first. The root
%% is looked through before this returns: headers only, files that are proven not to be what their
%% names say are removed, and so are temporary files that nobody works on any more.
%%
%% ```
%% {ok, _} = erllama_cache_store:start_link(my_store, #{root => "/var/cache/kv",
%%                                                      max_bytes => 100 bsl 30}).
%% '''
%%
%% A relative root is taken from the current directory of the moment, and stays what it is when that
%% changes.
%%
%% Errors: a POSIX reason, `badarg' or `{unencodable, Encoding}', of the root.
-spec start_link(name(), options()) -> {ok, pid()} | {error, term()}.
start_link(Name, Options) when is_atom(Name), not is_map_key(root, Options) ->
    error({missing_option, root});
start_link(Name, #{root := Root} = Options) when is_atom(Name) ->
    Complete = maps:merge(default_options(), Options),
    ok = maps:foreach(fun check_option/2, Complete),
    case erllama_cache_path:absolute(Root) of
        {ok, Absolute, Path} ->
            erllama_cache_store_server:start_link(Name, Path, Complete#{root := Absolute});
        {error, _} = Error ->
            Error
    end.

default_options() ->
    Defaults = #{tier => disk, max_bytes => infinity},
    case application:get_env(erllama_cache_nif, mac_key) of
        {ok, Source} -> Defaults#{mac_key => Source};
        undefined -> Defaults
    end.

check_option(root, _Root) -> ok;
check_option(tier, Tier) when Tier =:= disk; Tier =:= ram_file -> ok;
check_option(max_bytes, infinity) -> ok;
check_option(max_bytes, Bytes) when is_integer(Bytes), Bytes > 0 -> ok;
check_option(mac_key, {file, _Path}) -> ok;
check_option(mac_key, Fun) when is_function(Fun, 0) -> ok;
check_option(mac_key, _Secret) -> error({invalid_option, mac_key, hidden});
check_option(Key, Value) -> error({invalid_option, Key, Value}).

%% @doc For a supervisor of one's own.
%%
%% ```
%% #{start := {erllama_cache_store, start_link, _}} =
%%     erllama_cache_store:child_spec(my_store, #{root => "/var/cache/kv"}).
%% '''
-spec child_spec(name(), options()) -> supervisor:child_spec().
child_spec(Name, Options) when is_map(Options), not is_map_key(root, Options) ->
    #{id => {?MODULE, Name}, start => {?MODULE, start_link, [Name, Options]}};
child_spec(Name, #{root := Root} = Options) ->
    %% For a restart, too, which may come after a change of the current directory.
    Fixed = case erllama_cache_path:absolute(Root) of
        {ok, Absolute, _Path} -> Options#{root := Absolute};
        %% The start says it.
        {error, _} -> Options
    end,
    #{id => {?MODULE, Name}, start => {?MODULE, start_link, [Name, Fixed]}}.

%%% For everybody

%% @doc Loads what is stored under a key, in the calling process. Every byte has been checked when
%% this returns; what does not hold its checks is `{error, {corrupt, Reason}}' and never returned.
%% Such a file stays until it is replaced by a save of the same key, or deleted.
%%
%% ```
%% {ok, #{context_size := 4096, hit_count := 0, tokens := Tokens}, Payload} =
%%     erllama_cache_store:load(my_store, Key),
%% [1, 15043, 3186] = [Token || <<Token:32/little>> <= Tokens].
%% '''
%%
%% Errors: `{corrupt, Reason}'; `unauthenticated', there is a secret and the file was made without
%% it; `enomem'; a POSIX reason. {@link erllama_cache_writer:format_error/1} says what they mean.
%% Exits with `{noproc, _}' when the store does not run.
-spec load(name(), erllama_cache_writer:key()) ->
    {ok, file_info(), Payload :: binary()} | miss | {error, term()}.
load(Name, Key) when is_atom(Name), ?IS_KEY(Key) ->
    Config = config(Name),
    %% Only this row may be removed: a save can end while the load finds out that there is no file.
    Known = erllama_cache_index:row(Name, Key),
    Result = load_slices(Config, Key),
    ok = notice_other_root(Config),
    case Result of
        {ok, Info, _Payload} ->
            count_one(Config, ?HITS),
            used(Config, Key, Info, Known);
        miss ->
            count_one(Config, ?MISSES),
            gone(Config, Known);
        {error, Reason} when Reason =:= unauthenticated; element(1, Reason) =:= corrupt ->
            %% A save of this key finds the file and replaces it.
            count_one(Config, ?REFUSED),
            erllama_cache_index:refuse(Name, Known);
        {error, _} ->
            ok
    end,
    Result.

load_slices(#config{path = Path, secret = Secret}, Key) ->
    Begin = fun(Turn) -> erllama_cache_nif:load(Turn, Path, Key, Secret) end,
    erllama_cache_turn:run_slices(Begin, fun erllama_cache_nif:load_more/2).

used(#config{name = Name} = Config, Key, #{file_size := Size, last_used_time := InFile}, Known) ->
    Now = now_ms(),
    case erllama_cache_index:use(Name, Key, Now) of
        {Uses, Noted} -> note_in_file(Config, Key, Uses, [Noted, InFile], Now div 1000);
        %% Saved by another node on the same root.
        false when Known =:= none -> found(Config, Key, Size, Now);
        %% Deleted since.
        false -> ok
    end.

%% For the order of eviction after a restart: an hour is exact enough, and a file that changes with
%% each load would be resent by each backup. A note as far in the future is by a clock that was
%% wrong, and would have the file taken for just used at each start until then.
note_in_file(#config{name = Name, path = Path}, Key, Uses, Notes, Now) ->
    IsDue = lists:all(fun(Note) -> abs(Now - Note) >= ?NOTE_EVERY end, Notes),
    case IsDue andalso Uses > 0 of
        true ->
            ok = erllama_cache_nif:note_use(Path, Key, min(Uses, 16#ffffffff), Now),
            erllama_cache_index:noted(Name, Key, Uses, Now);
        false ->
            ok
    end.

%% A file is there that the index does not know.
found(#config{max_bytes = infinity, name = Name}, Key, Size, LastUsed) ->
    _ = erllama_cache_index:add(Name, erllama_cache_index:file(Key, Size, LastUsed, make_ref())),
    ok;
found(#config{name = Name}, Key, Size, LastUsed) ->
    gen_server:cast(Name, {found, Key, Size, LastUsed}).

%% The file of this row is not there.
gone(_Config, none) ->
    ok;
gone(_Config, #row{state = reserved}) ->
    ok;
gone(#config{max_bytes = infinity, name = Name}, Row) ->
    _ = erllama_cache_index:remove(Name, Row),
    ok;
gone(#config{name = Name}, Row) ->
    gen_server:cast(Name, {gone, Row}).

%% Somebody has made the root anew, or mounted something there: the index is that of another
%% directory.
notice_other_root(#config{name = Name, path = Path, generation = Generation}) ->
    case erllama_cache_nif:root_generation(Path) =:= atomics:get(Generation, 1) of
        true -> ok;
        false -> gen_server:cast(Name, look_again)
    end.

%% @doc Deletes what is stored under a key; `ok' also when nothing is. Errors: a POSIX reason.
%%
%% ```
%% ok = erllama_cache_store:delete(my_store, Key).
%% '''
-spec delete(name(), erllama_cache_writer:key()) -> ok | {error, term()}.
delete(Name, Key) when is_atom(Name), ?IS_KEY(Key) ->
    #config{path = Path} = Config = config(Name),
    Known = erllama_cache_index:row(Name, Key),
    case erllama_cache_turn:run(fun(Turn) -> erllama_cache_nif:delete(Turn, Path, Key) end) of
        %% Whether there was one.
        Existed when is_boolean(Existed) -> gone(Config, Known);
        {error, _} = Error -> Error
    end.

%% @doc The key that a save with this map gets: 32 bytes. Of the map's keys it wants those that the
%% key is made of, `fingerprint', `quant_type', `ctx_params_hash' and `tokens', and looks at no
%% other.
%%
%% ```
%% {ok, Key} = erllama_cache_store:key(#{fingerprint => Fingerprint, quant_type => f16,
%%                                       ctx_params_hash => CtxParamsHash, tokens => [1, 15043]}).
%% '''
%%
%% Errors: `{missing_key, Key}' and `{invalid_meta, Key}'.
-spec key(erllama_cache_meta:identity()) ->
    {ok, erllama_cache_writer:key()} | {error, erllama_cache_meta:invalid()}.
key(Meta) when is_map(Meta) ->
    case erllama_cache_meta:check_identity(Meta) of
        ok ->
            case identify(Meta) of
                {ok, {Key, _QuantByte, _Tokens}} -> {ok, Key};
                {error, _} = Error -> Error
            end;
        {error, _} = Error ->
            Error
    end.

%% @doc What the store holds and what it has done since it started. Files are all under keys' names,
%% those among them that no load takes; bytes are those of whole files. `refused' counts loads that
%% found such a file. Exits with `{noproc, _}' when the store does not run.
%%
%% ```
%% #{files := Files, bytes := Bytes, hits := Hits} = erllama_cache_store:info(my_store).
%% '''
-spec info(name()) -> info().
info(Name) when is_atom(Name) ->
    #config{root = Root, tier = Tier, max_bytes = MaxBytes, counters = Counters} = config(Name),
    {Files, Bytes, Reservations} = erllama_cache_index:count(Name),
    Done = [{Counter, counters:get(Counters, Index)} || {Index, Counter} <- enumerate(?COUNTERS)],
    maps:merge(
        #{
            name => Name, root => Root, tier => Tier, max_bytes => MaxBytes,
            files => Files, bytes => Bytes, reservations => Reservations
        },
        maps:from_list(Done)
    ).

%% @private
%% Whether a store of this name runs here.
-spec is_store(atom()) -> boolean().
is_store(Name) ->
    case erllama_cache_index:find_config(Name) of
        {ok, #config{}} -> true;
        _ -> false
    end.

enumerate(List) ->
    lists:zip(lists:seq(1, length(List)), List).

config(Name) ->
    erllama_cache_index:config(Name).

count_one(#config{counters = Counters}, Index) ->
    counters:add(Counters, Index, 1).

now_ms() ->
    erlang:system_time(millisecond).

%%% For the writer

%% @private
identify(#{fingerprint := Fingerprint, quant_type := QuantType, ctx_params_hash := CtxParamsHash,
           tokens := Tokens}) ->
    case {erllama_cache_nif:quant_byte(QuantType), encode_tokens(Tokens)} of
        {?NO_KNOWN_TYPE, _} ->
            %% All of them share one byte, and so would their keys: a load of the one would give the
            %% other's state.
            {error, {invalid_meta, quant_type}};
        {_, error} ->
            {error, {invalid_meta, tokens}};
        {QuantByte, Encoded} ->
            {ok, {key(Fingerprint, QuantByte, CtxParamsHash, Encoded), QuantByte, Encoded}}
    end.

key(Fingerprint, QuantByte, CtxParamsHash, Encoded) when byte_size(Encoded) =< ?FEW_TOKENS ->
    erllama_cache_nif:key(Fingerprint, QuantByte, CtxParamsHash, Encoded);
key(Fingerprint, QuantByte, CtxParamsHash, Encoded) ->
    erllama_cache_nif:key_of_many(Fingerprint, QuantByte, CtxParamsHash, Encoded).

%% More tokens than a NIF should hold a scheduler for, and numbers beyond 64 bits, are rare enough
%% to be Erlang's.
encode_tokens(Tokens) ->
    case erllama_cache_nif:encode_tokens(Tokens) of
        error -> encode_tokens_slowly(Tokens);
        Encoded -> Encoded
    end.

encode_tokens_slowly(Tokens) ->
    case erllama_cache_meta:are_tokens(Tokens) of
        true -> <<<<Token:32/little>> || Token <- Tokens>>;
        false -> error
    end.

%% @private
reserve(Name, Tier, Key, Size) ->
    case config(Name) of
        #config{tier = Tier, max_bytes = infinity, server = Server} ->
            reserve_unbounded(Name, Server, Key, Size);
        #config{tier = Tier} ->
            reserve_bounded(Name, Key, Size);
        #config{tier = Other} -> {error, {wrong_tier, Other}}
    end.

reserve_unbounded(Name, Server, Key, Size) ->
    case erllama_cache_index:claimable(Name, Key) of
        {ok, Old} ->
            %% Set first: should this process be killed in between, the server still hears of it.
            %% Not by its name, which may be that of the next one by then.
            Token = erlang:start_timer(?UNWATCHED, Server, {watch, Key, Size, self()}),
            Row = erllama_cache_index:reservation(Key, Size, Token, self()),
            case erllama_cache_index:claim(Name, Old, Row) of
                true ->
                    ok = overdue(Name, Old),
                    {ok, Token};
                false ->
                    done(Name, Token),
                    reserve_unbounded(Name, Server, Key, Size)
            end;
        {error, _} = Error ->
            Error
    end.

%% The server may still watch over the reservation whose place was taken.
overdue(Name, #row{state = reserved, token = Token}) -> gen_server:cast(Name, {done, Token});
overdue(_Name, _FileOrNone) -> ok.

reserve_bounded(Name, Key, Size) ->
    %% Who makes room has to be one. What the disk knows, the server need not wait for.
    case erllama_cache_index:claimable(Name, Key) of
        {ok, _Old} ->
            Row = erllama_cache_index:reservation(Key, Size, make_ref(), self()),
            gen_server:call(Name, {admit, Row}, infinity);
        {error, _} = Error ->
            Error
    end.

%% @private
root(Name) ->
    (config(Name))#config.root.

%% @private
%% A reservation whose lease has ended stands until somebody else takes it: nobody wanted the key.
check(Name, Key, Token) ->
    erllama_cache_index:renew(Name, Key, Token).

%% @private
%% There is nothing to remember: should the process die now, the server looks for a file anyway.
mark_published(Name, Key, Token, _Root) ->
    check(Name, Key, Token).

%% @private
announce(Name, Key, Token, Size, _Header, _Tokens) ->
    File = erllama_cache_index:file(Key, Size, now_ms(), Token),
    case erllama_cache_index:settle(Name, Token, File) of
        ok ->
            ok = done(Name, Token),
            notice_other_root(config(Name));
        {error, expired} = Error ->
            Error
    end.

%% @private
cancel(Name, Key, Token) ->
    _ = erllama_cache_index:remove(Name, #row{key = Key, token = Token, state = reserved}),
    done(Name, Token).

%% @private
count(Name, {saved, _Reason}) -> count_one(config(Name), ?SAVES);
count(Name, duplicate_dropped) -> count_one(config(Name), ?DUPLICATES).

%% The reservation is over. In an unbounded store the server need not know, unless it has been told
%% of the reservation.
done(Name, Token) ->
    Unheard = (config(Name))#config.max_bytes =:= infinity andalso
        is_integer(erlang:cancel_timer(Token)),
    case Unheard of
        true -> ok;
        false -> gen_server:cast(Name, {done, Token})
    end.
