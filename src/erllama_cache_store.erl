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

-include("erllama_cache_log.hrl").

-export([start_link/2, child_spec/2]).
-export([load/2, delete/2, info/1, key/1]).
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
    tokens := [0..16#ffffffff],
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

%% A row of the index. While its state is not `present' somebody has reserved the key: then `size'
%% is what the file may take.
-record(row, {
    key :: erllama_cache_nif:key() | '_' | '$2',
    size :: non_neg_integer() | '_',
    %% Milliseconds of system time.
    last_used :: integer() | '_' | '$1',
    state :: present | reserved | '_',
    token :: reference() | undefined | '_',
    pid :: pid() | undefined | '_',
    %% Milliseconds of monotonic time.
    expires :: integer() | undefined | '_'
}).

%% What never changes of a store. It is in the index too, as `{config, config, #config{}}': no key
%% looks like that.
-record(config, {
    name :: name(),
    server :: pid(),
    path :: erllama_cache_nif:root(),
    root :: file:name_all(),
    tier :: erllama_cache_host:tier(),
    max_bytes :: pos_integer() | infinity,
    secret :: none | erllama_cache_nif:secret(),
    counters :: counters:counters_ref()
}).

%% A reservation that the server watches over.
-record(watch, {key :: erllama_cache_nif:key(), monitor :: reference(), size :: non_neg_integer()}).

-record(state, {
    config :: #config{},
    watches = #{} :: #{reference() => #watch{}},
    %% Which reservation a monitor belongs to.
    monitors = #{} :: #{reference() => reference()},
    %% Bytes of all files and reservations. What changes it is told to the server in the order in
    %% which it happens, so it errs on the high side only.
    used = 0 :: non_neg_integer(),
    %% The least recently used keys with the time of their last use, as of the last look: a key that
    %% was used since then is skipped.
    oldest = [] :: [{LastUsed :: integer(), erllama_cache_nif:key()}]
}).

-define(LEASE, 60000).
%% For so many milliseconds a reservation in an unbounded store is watched by a timer alone, which
%% tells the server of it: most saves have ended by then, and those wake no server.
-define(UNWATCHED, 50).
%% A check leaves at least this much of the lease; it renews one only when there is less.
-define(LEASE_LEFT, 45000).
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
%% Errors: a POSIX reason, or `badarg', of the root.
-spec start_link(name(), options()) -> {ok, pid()} | {error, term()}.
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
%% {ok, #{tokens := [1, 15043, 3186], hit_count := 0}, Payload} =
%%     erllama_cache_store:load(my_store, Key).
%% '''
%%
%% Errors: `{corrupt, Reason}'; `unauthenticated', there is a secret and the file was made without
%% it; `enomem'; a POSIX reason. {@link erllama_cache_writer:format_error/1} says what they mean.
%% Exits with `{noproc, _}' when the store does not run.
-spec load(name(), erllama_cache_writer:key()) ->
    {ok, file_info(), Payload :: binary()} | miss | {error, term()}.
load(Name, Key) when is_atom(Name), ?IS_KEY(Key) ->
    Config = config(Name),
    %% Only this row may be forgotten: a save can end while the load finds out that there is no file.
    Known = ets:lookup(Name, Key),
    case load_slices(Config, Key) of
        {ok, #{file_size := Size, last_used_time := LastUsed}, _Payload} = Loaded ->
            count_one(Config, ?HITS),
            note_use(Name, Key, Size, Known),
            note_in_file(Config, Key, LastUsed),
            Loaded;
        miss ->
            count_one(Config, ?MISSES),
            forget(Name, Known),
            miss;
        {error, Reason} = Error when Reason =:= unauthenticated; element(1, Reason) =:= corrupt ->
            %% Forgotten, so that a save of this key finds it and replaces it.
            count_one(Config, ?REFUSED),
            forget(Name, Known),
            Error;
        {error, _} = Error ->
            Error
    end.

load_slices(#config{path = Path, secret = Secret}, Key) ->
    case erllama_cache_turn:run(fun() -> erllama_cache_nif:load(Path, Key, Secret) end) of
        {more, Load} -> load_more(Load);
        Result -> Result
    end.

load_more(Load) ->
    case erllama_cache_turn:run(fun() -> erllama_cache_nif:load_more(Load) end) of
        more -> load_more(Load);
        Result -> Result
    end.

note_use(Name, Key, Size, Known) ->
    Now = now_ms(),
    case ets:update_element(Name, Key, {#row.last_used, Now}) of
        false when Known =:= [] ->
            %% Saved by another node on the same root.
            case ets:insert_new(Name, present(Key, Size, Now)) of
                true -> gen_server:cast(Name, {used, Size});
                false -> ok
            end;
        _TrueOrDeletedSince ->
            ok
    end.

%% For the order of eviction after a restart: an hour is exact enough, and a file that changes with each
%% load would be resent by each backup.
note_in_file(#config{path = Path}, Key, LastUsed) ->
    Now = erlang:system_time(second),
    case Now - LastUsed >= ?NOTE_EVERY of
        true -> erllama_cache_nif:note_use(Path, Key, 1, Now);
        false -> ok
    end.

%% The token tells this row from a later one of the same key.
present(Key, Size, LastUsed) ->
    #row{key = Key, size = Size, last_used = LastUsed, state = present, token = make_ref()}.

%% Nothing covers the time of last use in a file: one in the future would never be evicted.
not_ahead(LastUsed) ->
    min(LastUsed, now_ms()).

%% Removes the row of a file that is not there, or not worth anything, unless it is another by now.
forget(Name, [#row{state = present, size = Size} = Row]) ->
    case ets:select_delete(Name, [{Row#row{last_used = '_'}, [], [true]}]) of
        1 -> gen_server:cast(Name, {used, -Size});
        0 -> ok
    end;
forget(_Name, _NothingOrReserved) ->
    ok.

%% @doc Deletes what is stored under a key; `ok' also when nothing is. Errors: a POSIX reason.
%%
%% ```
%% ok = erllama_cache_store:delete(my_store, Key).
%% '''
-spec delete(name(), erllama_cache_writer:key()) -> ok | {error, term()}.
delete(Name, Key) when is_atom(Name), ?IS_KEY(Key) ->
    Config = config(Name),
    Known = ets:lookup(Name, Key),
    case delete_file(Config, Key) of
        Existed when is_boolean(Existed) -> forget(Name, Known);
        {error, _} = Error -> Error
    end.

%% Whether there was one.
delete_file(#config{path = Path}, Key) ->
    erllama_cache_turn:run(fun() -> erllama_cache_nif:delete(Path, Key) end).

%% @doc The key that a save with this map gets: 32 bytes. Of the map's keys it wants those that the
%% key is made of, `fingerprint', `quant_type', `ctx_params_hash' and `tokens', and looks at no other.
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

%% @doc What the store holds and what it has done since it started. Bytes are those of whole files.
%% `refused' counts loads that found a corrupt file. Exits with `{noproc, _}' when the store does
%% not run.
%%
%% ```
%% #{files := Files, bytes := Bytes, hits := Hits} = erllama_cache_store:info(my_store).
%% '''
-spec info(name()) -> info().
info(Name) when is_atom(Name) ->
    #config{root = Root, tier = Tier, max_bytes = MaxBytes, counters = Counters} = config(Name),
    Held = ets:foldl(fun count_row/2, #{files => 0, bytes => 0, reservations => 0}, Name),
    Done = [{Counter, counters:get(Counters, Index)} || {Index, Counter} <- enumerate(?COUNTERS)],
    maps:merge(
        Held#{name => Name, root => Root, tier => Tier, max_bytes => MaxBytes},
        maps:from_list(Done)
    ).

count_row(#row{state = present, size = Size}, #{files := Files, bytes := Bytes} = Sum) ->
    Sum#{files := Files + 1, bytes := Bytes + Size};
count_row(#row{}, #{reservations := Reservations} = Sum) ->
    Sum#{reservations := Reservations + 1};
count_row({config, config, #config{}}, Sum) ->
    Sum.

enumerate(List) ->
    lists:zip(lists:seq(1, length(List)), List).

config(Name) ->
    try
        ets:lookup_element(Name, config, 3)
    of
        Config -> Config
    catch
        error:badarg -> exit({noproc, {?MODULE, config, [Name]}})
    end.

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

%% More tokens than a NIF should hold a scheduler for, and numbers beyond 64 bits, are rare enough to
%% be Erlang's.
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
            %% Set first: should this process be killed in between, the server still hears of it. Not by
            %% its name, which may be that of the next one by then.
            Token = erlang:start_timer(?UNWATCHED, Server, {watch, Key, Size, self()}),
            case claim(Name, Old, reserved(Key, Size, Token)) of
                true ->
                    {ok, Token};
                false ->
                    done(Name, Token, 0),
                    reserve_unbounded(Name, Server, Key, Size)
            end;
        {error, _} = Error ->
            Error
    end.

reserve_bounded(Name, Key, Size) ->
    %% Who makes room has to be one.
    case claimable(Name, Key) of
        {ok, _Old} ->
            Row = reserved(Key, Size, make_ref()),
            gen_server:call(Name, {admit, Row}, infinity);
        {error, _} = Error ->
            Error
    end.

reserved(Key, Size, Token) ->
    #row{key = Key, size = Size, last_used = 0, state = reserved, token = Token, pid = self(),
         expires = lease()}.

lease() ->
    erlang:monotonic_time(millisecond) + ?LEASE.

%% What a reservation may take the place of: nothing, or one whose process is dead or whose lease
%% has ended.
claimable(Name, Key) ->
    case ets:lookup(Name, Key) of
        [] -> {ok, none};
        [#row{state = present} = Row] -> present_still(Name, Row);
        [#row{pid = Pid, expires = Expires} = Row] ->
            Stands = Expires > erlang:monotonic_time(millisecond) andalso is_process_alive(Pid),
            case Stands of
                true -> {error, conflict};
                false -> {ok, Row}
            end
    end.

%% Another node, or a person, may have deleted the file: then the row tells of nothing. Where the root
%% cannot be looked into, nothing is known, and least of all that the key is stored.
present_still(Name, #row{key = Key} = Row) ->
    #config{path = Path} = config(Name),
    case erllama_cache_turn:run(fun() -> erllama_cache_nif:exists(Path, Key) end) of
        true ->
            {error, already_present};
        false ->
            forget(Name, [Row]),
            {ok, none};
        {error, _} = Error ->
            Error
    end.

claim(Name, none, Row) ->
    ets:insert_new(Name, Row);
claim(Name, Old, Row) ->
    ets:select_replace(Name, [{Old, [], [{const, Row}]}]) =:= 1.

%% @private
root(Name) ->
    (config(Name))#config.root.

%% @private
%% A reservation whose lease has ended stands until somebody else takes it: nobody wanted the key.
check(Name, Key, Token) ->
    case held(Name, Key, Token) of
        {surely, _Row} -> ok;
        {maybe_still, Row} -> replace(Name, Row, Row#row{expires = lease()});
        no -> {error, expired}
    end.

%% Whether the reservation is its owner's, and will be for long enough to act on that.
held(Name, Key, Token) ->
    Enough = erlang:monotonic_time(millisecond) + ?LEASE_LEFT,
    case ets:lookup(table(Name), Key) of
        [#row{token = Token, expires = Expires} = Row] when Expires > Enough -> {surely, Row};
        [#row{token = Token} = Row] -> {maybe_still, Row};
        _ -> no
    end.

replace(Name, Old, New) ->
    case ets:select_replace(table(Name), [{Old, [], [{const, New}]}]) of
        1 -> ok;
        0 -> {error, expired}
    end.

%% @private
%% There is nothing to remember: should the process die now, the server looks for a file anyway.
mark_published(Name, Key, Token, _Root) ->
    check(Name, Key, Token).

%% @private
announce(Name, Key, Token, Size, _Header, _Tokens) ->
    Present = present(Key, Size, now_ms()),
    Settled = case held(Name, Key, Token) of
        {surely, _Row} ->
            true = ets:insert(Name, Present),
            ok;
        _ ->
            settle(Name, Token, Present)
    end,
    case Settled of
        ok -> done(Name, Token, Size);
        {error, expired} = Error -> Error
    end.

%% Makes a reservation a file, whatever has become of its owner.
settle(Name, Token, #row{key = Key} = Present) ->
    Reserved = #row{key = Key, token = Token, _ = '_'},
    replace(Name, Reserved, Present).

%% @private
cancel(Name, Key, Token) ->
    _ = ets:select_delete(table(Name), [{#row{key = Key, token = Token, _ = '_'}, [], [true]}]),
    done(Name, Token, 0).

%% @private
count(Name, {saved, _Reason}) -> count_one(config(Name), ?SAVES);
count(Name, duplicate_dropped) -> count_one(config(Name), ?DUPLICATES).

%% The reservation is over, and this is what became of the room it took. In an unbounded store the
%% server need not know, unless it has been told of the reservation.
done(Name, Token, Size) ->
    Unheard = (config(Name))#config.max_bytes =:= infinity andalso
        is_integer(erlang:cancel_timer(Token)),
    case Unheard of
        true -> ok;
        false -> gen_server:cast(Name, {done, Token, Size})
    end.

table(Name) ->
    case ets:whereis(Name) of
        undefined -> exit({noproc, {?MODULE, table, [Name]}});
        Table -> Table
    end.

%%% The server

%% @private
init({Name, Path, Options}) ->
    case erllama_cache_secret:read(maps:get(mac_key, Options, undefined)) of
        {ok, Secret} -> open(Name, Path, Options, Secret);
        {error, Reason} -> {stop, Reason}
    end.

open(Name, Path, #{root := Root, tier := Tier, max_bytes := MaxBytes}, Secret) ->
    Name = ets:new(Name, [
        named_table, public, {keypos, #row.key}, {read_concurrency, true}, {write_concurrency, true}
    ]),
    ok = erllama_cache_turn:setup(),
    ok = erllama_cache_metrics:setup(),
    Config = #config{
        name = Name, server = self(), path = Path, root = Root, tier = Tier, max_bytes = MaxBytes,
        secret = Secret, counters = counters:new(length(?COUNTERS), [write_concurrency])
    },
    true = ets:insert(Name, {config, config, Config}),
    Begun = erlang:monotonic_time(millisecond),
    case scan(Config) of
        {ok, Used} ->
            report_start(Config, Used, erlang:monotonic_time(millisecond) - Begun),
            {_, State} = make_room(0, #state{config = Config, used = Used}),
            {ok, State};
        {error, Reason} ->
            %% The starter hears of it before this process is gone, and may try again at once.
            true = ets:delete(Name),
            {stop, Reason}
    end.

scan(#config{path = Path, secret = Secret} = Config) ->
    case erllama_cache_turn:run(fun() -> erllama_cache_nif:scan(Path, Secret =/= none) end) of
        {ok, Scan} -> scan(Scan, Config, 0);
        {error, _} = Error -> Error
    end.

scan(Scan, #config{name = Name} = Config, Used) ->
    case erllama_cache_turn:run(fun() -> erllama_cache_nif:scan_more(Scan) end) of
        {Progress, Found} when is_list(Found) ->
            Rows = [
                present(Key, Size, not_ahead(LastUsed * 1000))
             || {file, Key, Size, LastUsed} <- Found
            ],
            true = ets:insert(Name, Rows),
            lists:foreach(fun(Other) -> report(Other, Config) end, Found),
            Sum = lists:sum([Size || #row{size = Size} <- Rows]),
            case Progress of
                more -> scan(Scan, Config, Used + Sum);
                ok -> {ok, Used + Sum}
            end;
        {error, _} = Error ->
            Error
    end.

report_start(#config{name = Name, path = Path, root = Root}, Used, Took) ->
    %% The config has a row too.
    Files = ets:info(Name, size) - 1,
    ?LOG_INFO(#{event => store_scanned, store => Name, root => Root, files => Files, bytes => Used,
                ms => Took}, ?LOG_META),
    case erllama_cache_turn:run(fun() -> erllama_cache_nif:takes_unnamed(Path) end) of
        false -> ?LOG_NOTICE(#{event => root_needs_names, store => Name, root => Root}, ?LOG_META);
        %% An error is told by the first save that meets it.
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
report({skipped, Key, Reason}, #config{name = Name, root = Root}) ->
    File = case Key of
        undefined -> temporary_file;
        _ -> erllama_cache_path:final(Root, Key)
    end,
    ?LOG_WARNING(#{event => file_skipped, store => Name, reason => Reason, file => File},
                 ?LOG_META).

%% @private
handle_call({admit, Row}, _From, #state{config = Config} = State) ->
    #row{key = Key, size = Size, token = Token, pid = Pid} = Row,
    #config{name = Name, max_bytes = MaxBytes} = Config,
    case Size =< MaxBytes andalso claimable(Name, Key) of
        false ->
            {reply, {error, exceeds_max_bytes}, State};
        {error, _} = Error ->
            {reply, Error, State};
        {ok, Old} ->
            case make_room(Size, State) of
                {ok, Roomy} ->
                    %% Loads of other nodes' files make rows too: it may be taken by now.
                    case claim(Name, Old, Row) of
                        true -> {reply, {ok, Token}, watch(Token, Key, Size, Pid, Roomy)};
                        false -> {reply, {error, already_present}, Roomy}
                    end;
                {{error, _} = Error, Tried} ->
                    {reply, Error, Tried}
            end
    end;
handle_call(_Request, _From, State) ->
    {reply, {error, unknown_call}, State}.

%% @private
handle_cast({used, Bytes}, #state{used = Used} = State) ->
    {noreply, State#state{used = Used + Bytes}};
handle_cast({done, Token, Size}, State) ->
    {noreply, unwatch(Token, Size, State)};
handle_cast({checked, Token, Key, {ok, Size, LastUsed}}, #state{config = Config} = State) ->
    Present = present(Key, Size, not_ahead(LastUsed * 1000)),
    case settle(Config#config.name, Token, Present) of
        ok -> {noreply, unwatch(Token, Size, State)};
        {error, expired} -> {noreply, unwatch(Token, 0, State)}
    end;
handle_cast({checked, Token, Key, _NotThere}, #state{config = Config} = State) ->
    ok = cancel(Config#config.name, Key, Token),
    {noreply, State}.

%% @private
handle_info({timeout, Token, {watch, Key, Size, Pid}}, State) ->
    {noreply, watch(Token, Key, Size, Pid, State)};
handle_info({'DOWN', Monitor, process, _Pid, _Reason}, #state{monitors = Monitors} = State) ->
    case Monitors of
        #{Monitor := Token} -> {noreply, owner_died(Token, State)};
        _ -> {noreply, State}
    end;
handle_info(_Message, State) ->
    {noreply, State}.

watch(Token, Key, Size, Pid, State) ->
    #state{watches = Watches, monitors = Monitors, used = Used} = State,
    Monitor = monitor(process, Pid),
    State#state{
        watches = Watches#{Token => #watch{key = Key, monitor = Monitor, size = Size}},
        monitors = Monitors#{Monitor => Token},
        used = Used + Size
    }.

unwatch(Token, FileSize, #state{watches = Watches, monitors = Monitors, used = Used} = State) ->
    case maps:take(Token, Watches) of
        {#watch{monitor = Monitor, size = Size}, Rest} ->
            true = demonitor(Monitor, [flush]),
            State#state{
                watches = Rest,
                monitors = maps:remove(Monitor, Monitors),
                used = Used - Size + FileSize
            };
        error ->
            State
    end.

%% Its owner died in the middle of a save. If it had published the file by then, the file is looked
%% at and taken if it is good.
owner_died(Token, #state{config = #config{name = Name} = Config, watches = Watches} = State) ->
    #{Token := #watch{key = Key}} = Watches,
    case ets:lookup(Name, Key) of
        [#row{token = Token}] ->
            Server = self(),
            _ = spawn_link(fun() ->
                gen_server:cast(Server, {checked, Token, Key, check_file(Config, Key)})
            end),
            State;
        [#row{state = present, size = Size}] ->
            %% It had announced the file and could not say so any more.
            unwatch(Token, Size, State);
        _ ->
            unwatch(Token, 0, State)
    end.

check_file(#config{path = Path, secret = Secret}, Key) ->
    case erllama_cache_turn:run(fun() -> erllama_cache_nif:check(Path, Key, Secret) end) of
        {more, Check} -> check_more(Check);
        Result -> Result
    end.

check_more(Check) ->
    case erllama_cache_turn:run(fun() -> erllama_cache_nif:check_more(Check) end) of
        more -> check_more(Check);
        Result -> Result
    end.

%%% Eviction

%% How many of the least recently used are remembered from one look at all of them.
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
    Pattern = #row{key = '$2', last_used = '$1', state = present, _ = '_'},
    All = ets:select(Name, [{Pattern, [], [{{'$1', '$2'}}]}]),
    make_room(Needed, State#state{oldest = lists:sublist(lists:sort(All), ?LOOK)}, 0);
make_room(Needed, #state{oldest = [{LastUsed, Key} | Rest], config = Config} = State, Evicted) ->
    Next = State#state{oldest = Rest},
    case ets:lookup(Config#config.name, Key) of
        [#row{state = present, last_used = LastUsed} = Row] ->
            case evict(Row, Config) of
                true ->
                    Left = Next#state{used = State#state.used - Row#row.size},
                    make_room(Needed, Left, Evicted + 1);
                false ->
                    make_room(Needed, Next, Evicted)
            end;
        _UsedSince ->
            make_room(Needed, Next, Evicted)
    end.

evict(#row{key = Key, size = Size}, #config{name = Name} = Config) ->
    case delete_file(Config, Key) of
        Existed when is_boolean(Existed) ->
            Pattern = #row{key = Key, size = Size, state = present, _ = '_'},
            case ets:select_delete(Name, [{Pattern, [], [true]}]) of
                1 ->
                    count_one(Config, ?EVICTIONS),
                    true;
                0 ->
                    %% A load that missed has taken the row and told of it.
                    false
            end;
        {error, Reason} ->
            report({skipped, Key, Reason}, Config),
            false
    end.
