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
-behaviour(gen_server).
-behaviour(erllama_cache_host).

-include("erllama_cache_index.hrl").
-include("erllama_cache_log.hrl").

-export([start_link/2, child_spec/2]).
-export([load/2, delete/2, info/1, key/1, is_store/1]).
-export([identify/1, reserve/4, root/1, check/3, mark_published/4, announce/6, cancel/3, count/2]).
-export([init/1, handle_call/3, handle_cast/2, handle_info/2]).
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

%% What never changes of a store. It is in the index too, for those who do not ask the server.
-record(config, {
    name :: name(),
    server :: pid(),
    path :: erllama_cache_nif:root(),
    root :: file:name_all(),
    tier :: erllama_cache_host:tier(),
    max_bytes :: pos_integer() | infinity,
    secret :: none | erllama_cache_nif:secret(),
    counters :: counters:counters_ref(),
    %% Which directory the root was when it was looked through last: see root_generation/1 of the
    %% library. One number, changed by the server.
    generation :: atomics:atomics_ref()
}).

%% A reservation that the server watches over: until its owner says that it is over, or dies. Its
%% room is taken until then, whatever has become of its row.
-record(watch, {key :: erllama_cache_nif:key(), monitor :: reference(), size :: non_neg_integer()}).

-record(state, {
    config :: #config{},
    watches = #{} :: #{reference() => #watch{}},
    %% Which reservation a monitor belongs to.
    monitors = #{} :: #{reference() => reference()},
    %% In a bounded store: bytes of all that is watched, and of all files whose tokens are not
    %% watched. In such a store the server alone makes rows and removes them, but for a
    %% reservation's owner, who makes it a file or gives it up and then tells of it, or dies.
    used = 0 :: non_neg_integer(),
    %% The least recently used keys with the time of their last use, as of the last look: a key that
    %% was used since then is skipped.
    oldest = [] :: [{LastUsed :: integer(), erllama_cache_nif:key()}]
}).

%% For so many milliseconds a reservation in an unbounded store is watched by a timer alone, which
%% tells the server of it: most saves have ended by then, and those wake no server.
-define(UNWATCHED, 50).
%% Seconds between two notes of use in one file.
-define(NOTE_EVERY, 3600).
-define(COUNTERS, [saves, duplicates, hits, misses, refused, evictions]).
-define(SAVES, 1).
-define(DUPLICATES, 2).
-define(HITS, 3).
-define(MISSES, 4).
-define(REFUSED, 5).
-define(EVICTIONS, 6).

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
            gen_server:start_link(
                {local, Name}, ?MODULE, {Name, Path, Complete#{root := Absolute}}, []
            );
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
    case erllama_cache_turn:run(fun(Turn) -> erllama_cache_nif:load(Turn, Path, Key, Secret) end) of
        {more, Load} -> until_done(fun(Turn) -> erllama_cache_nif:load_more(Turn, Load) end);
        Result -> Result
    end.

%% Slice by slice, each in its turn.
until_done(Slice) ->
    case erllama_cache_turn:run(Slice) of
        more -> until_done(Slice);
        Result -> Result
    end.

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
    Config = config(Name),
    Known = erllama_cache_index:row(Name, Key),
    case delete_file(Config, Key) of
        Existed when is_boolean(Existed) -> gone(Config, Known);
        {error, _} = Error -> Error
    end.

%% Whether there was one.
delete_file(#config{path = Path}, Key) ->
    erllama_cache_turn:run(fun(Turn) -> erllama_cache_nif:delete(Turn, Path, Key) end).

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
    case claimable(Name, Key) of
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
    case claimable(Name, Key) of
        {ok, _Old} ->
            Row = erllama_cache_index:reservation(Key, Size, make_ref(), self()),
            gen_server:call(Name, {admit, Row}, infinity);
        {error, _} = Error ->
            Error
    end.

%% What a reservation may take the place of: nothing; the row of a file that is not there any more,
%% or that no load takes; a reservation whose process is dead or whose lease has ended.
claimable(Name, Key) ->
    case erllama_cache_index:row(Name, Key) of
        none -> {ok, none};
        #row{state = refused} = Row -> {ok, Row};
        #row{state = present} = Row -> present_still(Name, Row);
        #row{pid = Pid, expires = Expires} = Row ->
            Stands = Expires > erlang:monotonic_time(millisecond) andalso is_process_alive(Pid),
            case Stands of
                true -> {error, conflict};
                false -> {ok, Row}
            end
    end.

%% Another node, or a person, may have deleted the file: then the row tells of nothing. Where the
%% root cannot be looked into, nothing is known, and least of all that the key is stored.
present_still(Name, #row{key = Key} = Row) ->
    #config{path = Path} = config(Name),
    case erllama_cache_turn:run(fun(Turn) -> erllama_cache_nif:exists(Turn, Path, Key) end) of
        true -> {error, already_present};
        false -> {ok, Row};
        {error, _} = Error -> Error
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

%%% The server

%% @private
init({Name, Path, Options}) ->
    case erllama_cache_secret:read(maps:get(mac_key, Options, undefined)) of
        {ok, Secret} -> open(Name, Path, Options, Secret);
        {error, Reason} -> {stop, Reason}
    end.

open(Name, Path, #{root := Root, tier := Tier, max_bytes := MaxBytes}, Secret) ->
    ok = erllama_cache_turn:setup(),
    ok = erllama_cache_metrics:setup(),
    Config = #config{
        name = Name, server = self(), path = Path, root = Root, tier = Tier, max_bytes = MaxBytes,
        secret = Secret, counters = counters:new(length(?COUNTERS), [write_concurrency]),
        generation = atomics:new(1, [])
    },
    case erllama_cache_index:new(Name, Config) of
        ok -> look_through(#state{config = Config});
        error -> {stop, {name_taken, Name}}
    end.

look_through(#state{config = #config{name = Name} = Config} = State) ->
    Begun = erlang:monotonic_time(millisecond),
    case scan(removes, State) of
        {ok, Scanned} ->
            Took = erlang:monotonic_time(millisecond) - Begun,
            start_scanned(try_root(Config), Took, Scanned);
        {error, Reason} ->
            %% The starter hears of it before this process is gone, and may try again at once.
            ok = erllama_cache_index:delete(Name),
            {stop, Reason}
    end.

%% Whether anything can be saved here at all. An error that may pass is told by the first save that
%% meets it.
try_root(#config{path = Path}) ->
    erllama_cache_turn:run(fun(Turn) -> erllama_cache_nif:takes_unnamed(Turn, Path) end).

start_scanned({error, no_links}, _Took, #state{config = #config{name = Name}}) ->
    ok = erllama_cache_index:delete(Name),
    {stop, no_links};
start_scanned(TakesUnnamed, Took, #state{config = Config} = State) ->
    report_start(Config, TakesUnnamed, Took),
    {_, Roomy} = make_room(0, State),
    {ok, Roomy}.

%% Adds what the root has to the index. Others save and load meanwhile: what they know is newer.
scan(Removes, #state{config = Config} = State) ->
    #config{path = Path, secret = Secret, generation = Generation} = Config,
    Begin = fun(Turn) ->
        erllama_cache_nif:scan(Turn, Path, Secret =/= none, Removes =:= removes)
    end,
    case erllama_cache_turn:run(Begin) of
        {ok, Scan} ->
            ok = atomics:put(Generation, 1, erllama_cache_nif:root_generation(Path)),
            scan_slices(Scan, State);
        {error, _} = Error ->
            Error
    end.

scan_slices(Scan, #state{config = Config} = State) ->
    case erllama_cache_turn:run(fun(Turn) -> erllama_cache_nif:scan_more(Turn, Scan) end) of
        {Progress, Found} when is_list(Found) ->
            ok = lists:foreach(fun(Other) -> report(Other, Config) end, Found),
            Added = lists:foldl(fun add_found/2, State, Found),
            case Progress of
                more -> scan_slices(Scan, Added);
                ok -> {ok, Added}
            end;
        {error, _} = Error ->
            Error
    end.

add_found({file, Key, Size, LastUsed}, State) ->
    add(erllama_cache_index:file(Key, Size, LastUsed * 1000, make_ref()), State);
%% What no load takes has its room, too, and goes when room is wanted.
add_found({skipped, <<_:256>> = Key, Size, Modified, _Reason}, State) when Size > 0 ->
    add(erllama_cache_index:refused_file(Key, Size, Modified * 1000, make_ref()), State);
add_found(_Other, State) ->
    State.

add(#row{size = Size} = Row, #state{config = #config{name = Name}, used = Used} = State) ->
    case erllama_cache_index:add(Name, Row) of
        true -> State#state{used = Used + Size};
        false -> State
    end.

report_start(#config{name = Name, root = Root}, TakesUnnamed, Took) ->
    {Files, Bytes, _Reservations} = erllama_cache_index:count(Name),
    ?LOG_INFO(#{event => store_scanned, store => Name, root => Root, files => Files, bytes => Bytes,
                ms => Took}, ?LOG_META),
    case TakesUnnamed of
        false -> ?LOG_NOTICE(#{event => root_needs_names, store => Name, root => Root}, ?LOG_META);
        _ -> ok
    end.

report({file, _Key, _Size, _LastUsed}, _Config) ->
    ok;
report(swept, _Config) ->
    ok;
report({removed, Key, Reason}, #config{name = Name, root = Root}) ->
    ?LOG_WARNING(#{
        event => corrupt_file_removed, store => Name, reason => Reason,
        file => erllama_cache_path:final(Root, Key)
    }, ?LOG_META);
report({skipped, Key, _Size, _Modified, Reason}, #config{name = Name, root = Root}) ->
    File = case Key of
        undefined -> temporary_file;
        _ -> erllama_cache_path:final(Root, Key)
    end,
    ?LOG_WARNING(#{event => file_skipped, store => Name, reason => Reason, file => File},
                 ?LOG_META).

%% @private
handle_call({admit, Row}, _From, State) ->
    {Reply, Next} = admit(Row, State),
    {reply, Reply, Next};
handle_call(audit, _From, State) ->
    {reply, books(State), State};
handle_call(_Request, _From, State) ->
    {reply, {error, unknown_call}, State}.

%% @private
handle_cast({done, Token}, State) ->
    {noreply, unwatch(Token, State)};
handle_cast({found, Key, Size, LastUsed}, State) ->
    {noreply, add(erllama_cache_index:file(Key, Size, LastUsed, make_ref()), State)};
handle_cast({gone, Row}, #state{config = #config{name = Name}} = State) ->
    case erllama_cache_index:remove(Name, Row) of
        true -> {noreply, left(Row, State)};
        false -> {noreply, State}
    end;
handle_cast({checked, Token, Key, {ok, Size, LastUsed}}, #state{config = Config} = State) ->
    File = erllama_cache_index:file(Key, Size, LastUsed * 1000, Token),
    _ = erllama_cache_index:settle(Config#config.name, Token, File),
    {noreply, unwatch(Token, State)};
handle_cast({checked, Token, Key, _NotThere}, #state{config = Config} = State) ->
    _ = erllama_cache_index:remove(
        Config#config.name, #row{key = Key, token = Token, state = reserved}
    ),
    {noreply, unwatch(Token, State)};
handle_cast(look_again, State) ->
    {noreply, look_again(State)}.

%% @private
handle_info({timeout, Token, {watch, Key, Size, Pid}}, #state{config = Config} = State) ->
    %% The timer may have gone off just as the save ended, and this come after its `done'.
    case erllama_cache_index:row(Config#config.name, Key) of
        #row{token = Token, state = reserved} -> {noreply, watch(Token, Key, Size, Pid, State)};
        _ -> {noreply, State}
    end;
handle_info({'DOWN', Monitor, process, _Pid, _Reason}, #state{monitors = Monitors} = State) ->
    case Monitors of
        #{Monitor := Token} -> {noreply, owner_died(Token, State)};
        _ -> {noreply, State}
    end;
handle_info(_Message, State) ->
    {noreply, State}.

admit(#row{key = Key, size = Size} = Row, State) ->
    #state{config = #config{name = Name, max_bytes = MaxBytes}} = State,
    case Size =< MaxBytes andalso claimable(Name, Key) of
        false ->
            {{error, exceeds_max_bytes}, State};
        {error, _} = Error ->
            {Error, State};
        {ok, Old} ->
            case fits_beside_reservations(Size, Old, State) of
                true -> admit(Row, Old, State);
                false -> {{error, no_room}, State}
            end
    end.

%% What is reserved cannot be evicted: where that leaves too little room, no file goes in vain.
fits_beside_reservations(Size, Old, #state{config = Config, watches = Watches}) ->
    #config{name = Name, max_bytes = MaxBytes} = Config,
    Others = case Old of
        none -> Watches;
        #row{token = Going} -> maps:remove(Going, Watches)
    end,
    Reserved = [
        Watched
     || {Token, #watch{key = Key, size = Watched}} <- maps:to_list(Others),
        is_reserved(Token, erllama_cache_index:row(Name, Key))
    ],
    Size + lists:sum(Reserved) =< MaxBytes.

is_reserved(Token, #row{token = Token, state = reserved}) -> true;
is_reserved(_Token, _Row) -> false.

admit(#row{key = Key, size = Size, token = Token, pid = Pid} = Row, Old, State) ->
    #state{config = #config{name = Name}} = State,
    %% A file that is not there any more, or that is to be replaced, has its room no longer.
    case make_room(Size - room_of(Old, State), State) of
        {ok, Roomy} ->
            case erllama_cache_index:claim(Name, Old, Row) of
                true -> {{ok, Token}, watch(Token, Key, Size, Pid, left(Old, Roomy))};
                %% It was evicted to make room, or a load has refused it since.
                false -> admit(Row, Roomy)
            end;
        {{error, _} = Error, Tried} ->
            {Error, Tried}
    end.

%% What a row's going would free.
room_of(none, _State) -> 0;
room_of(#row{token = Token, size = Size, state = RowState}, #state{watches = Watches}) ->
    case Watches of
        #{Token := #watch{size = Watched}} -> Watched;
        #{} when RowState =:= reserved -> 0;
        #{} -> Size
    end.

%% A row has left the index, or has made way for another: its room is free.
left(none, State) ->
    State;
left(#row{token = Token} = Row, #state{watches = Watches, used = Used} = State) ->
    case Watches of
        #{Token := _} -> forget(Token, State);
        #{} -> State#state{used = Used - room_of(Row, State)}
    end.

watch(Token, Key, Size, Pid, State) ->
    #state{watches = Watches, monitors = Monitors, used = Used} = State,
    Monitor = monitor(process, Pid),
    State#state{
        watches = Watches#{Token => #watch{key = Key, monitor = Monitor, size = Size}},
        monitors = Monitors#{Monitor => Token},
        used = Used + Size
    }.

%% The reservation is over: what it has become, if anything, has its own room now.
unwatch(Token, #state{watches = Watches, config = #config{name = Name}} = State) ->
    case Watches of
        #{Token := #watch{key = Key}} ->
            #state{used = Used} = Forgotten = forget(Token, State),
            case erllama_cache_index:row(Name, Key) of
                #row{token = Token, state = FileState, size = Size} when FileState =/= reserved ->
                    Forgotten#state{used = Used + Size};
                _ ->
                    Forgotten
            end;
        #{} ->
            State
    end.

forget(Token, #state{watches = Watches, monitors = Monitors, used = Used} = State) ->
    {#watch{monitor = Monitor, size = Size}, Rest} = maps:take(Token, Watches),
    true = demonitor(Monitor, [flush]),
    State#state{
        watches = Rest, monitors = maps:remove(Monitor, Monitors), used = Used - Size
    }.

%% Its owner died in the middle of a save. If it had published the file by then, the file is looked
%% at and taken if it is good.
owner_died(Token, #state{config = #config{name = Name} = Config, watches = Watches} = State) ->
    #{Token := #watch{key = Key}} = Watches,
    case erllama_cache_index:row(Name, Key) of
        #row{token = Token, state = reserved} ->
            Server = self(),
            %% Not linked: should the look fail, the reservation's lease ends, and that is all.
            _ = spawn(fun() ->
                gen_server:cast(Server, {checked, Token, Key, check_file(Config, Key)})
            end),
            State;
        %% It had announced the file, or somebody else has the key by now.
        _ ->
            unwatch(Token, State)
    end.

check_file(#config{path = Path, secret = Secret}, Key) ->
    Begin = fun(Turn) -> erllama_cache_nif:check(Turn, Path, Key, Secret) end,
    case erllama_cache_turn:run(Begin) of
        {more, Check} -> until_done(fun(Turn) -> erllama_cache_nif:check_more(Turn, Check) end);
        Result -> Result
    end.

%% The root's path leads to another directory than the index is of. What is being saved is being
%% saved there, or has been saved here.
look_again(#state{config = #config{name = Name, path = Path, root = Root} = Config} = State) ->
    #config{generation = Generation} = Config,
    case erllama_cache_nif:root_generation(Path) =:= atomics:get(Generation, 1) of
        true ->
            %% Several have noticed it.
            State;
        false ->
            ?LOG_WARNING(#{event => root_changed, store => Name, root => Root}, ?LOG_META),
            ok = erllama_cache_index:clear(Name),
            Watched = lists:sum([Size || #watch{size = Size} <- maps:values(State#state.watches)]),
            %% Nobody has said that what is here now may be removed.
            case scan(removes_nothing, State#state{used = Watched, oldest = []}) of
                {ok, Scanned} ->
                    {_, Roomy} = make_room(0, Scanned),
                    Roomy;
                {error, Reason} ->
                    ?LOG_WARNING(#{event => root_unreadable, store => Name, root => Root,
                                   reason => Reason}, ?LOG_META),
                    State#state{used = Watched, oldest = []}
            end
    end.

%% For tests: what the store counts as used, and what it should; equal at any time in a bounded
%% store.
books(#state{config = #config{name = Name}, watches = Watches, used = Used}) ->
    Files = maps:without(maps:keys(Watches), erllama_cache_index:sizes(Name)),
    Watched = [Size || #watch{size = Size} <- maps:values(Watches)],
    #{
        used => Used,
        should => lists:sum(maps:values(Files)) + lists:sum(Watched),
        watches => map_size(Watches)
    }.

%%% Eviction

%% At least so many of the least recently used are remembered from one look at all of them.
-define(LOOK, 1000).

make_room(_Needed, #state{config = #config{max_bytes = infinity}} = State) ->
    {ok, State};
make_room(Needed, State) ->
    make_room(Needed, State, 1).

%% `Evicted' counts since the last look: a look at which nothing could be evicted was the last.
make_room(Needed, #state{used = Used, config = #config{max_bytes = Max}} = State, _Evicted) when
    Used + Needed =< Max
->
    {ok, State};
make_room(_Needed, #state{oldest = []} = State, 0) ->
    {{error, no_room}, State};
make_room(Needed, #state{oldest = [], config = #config{name = Name}} = State, _Evicted) ->
    make_room(Needed, State#state{oldest = erllama_cache_index:oldest(Name, ?LOOK)}, 0);
make_room(Needed, #state{oldest = [{LastUsed, Key} | Rest], config = Config} = State, Evicted) ->
    Next = State#state{oldest = Rest},
    case erllama_cache_index:row(Config#config.name, Key) of
        #row{state = RowState, last_used = LastUsed} = Row when RowState =/= reserved ->
            case evict(Row, Config) of
                evicted -> make_room(Needed, left(Row, Next), Evicted + 1);
                kept -> make_room(Needed, Next, Evicted);
                %% No other file could be evicted either.
                {error, _} = Error -> {Error, Next}
            end;
        _UsedSince ->
            make_room(Needed, Next, Evicted)
    end.

evict(#row{key = Key, size = Size} = Row, #config{name = Name} = Config) ->
    case delete_file(Config, Key) of
        Existed when is_boolean(Existed) ->
            case erllama_cache_index:remove(Name, Row) of
                true ->
                    count_one(Config, ?EVICTIONS),
                    evicted;
                false ->
                    kept
            end;
        {error, Reason} ->
            report({skipped, Key, Size, 0, Reason}, Config),
            case is_of_one_file(Reason) of
                true -> kept;
                false -> {error, Reason}
            end
    end.

%% What forbids to remove this file, as against what is wrong with the whole root.
is_of_one_file(eperm) -> true;
is_of_one_file(eisdir) -> true;
is_of_one_file(ebusy) -> true;
is_of_one_file(etxtbsy) -> true;
is_of_one_file(_) -> false.
