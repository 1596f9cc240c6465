%% @doc Saves KV state, a limited number of saves at a time.
%%
%% A save takes a slot, reserves its key with the host, writes the payload to a temporary file,
%% checks and syncs it, publishes it under its final name, and tells the host. Everything runs in
%% the calling process; the payload is never copied. The slots belong to a semaphore in the NIF
%% library: it is fair, nobody polls, and a slot comes back however its owner ends. The server of
%% this name owns the configuration, not the slots.
-module(erllama_cache_writer).
-behaviour(gen_server).

-include("erllama_cache_limits.hrl").
-include("erllama_cache_log.hrl").

-export([start_link/0, start_link/1]).
-export([save/4, save/5, save_async/4, save_async/5, cancel/1]).
-export([format_error/1]).
-export([acquire/1, acquire/2, release/0, with_slot/2]).
-export([current/0, max_concurrent/0, set_max_concurrent/1, set_max_inflight_bytes/1]).
-export([info/0, holders/0, waiters/0]).
-export([init/1, handle_call/3, handle_cast/2, handle_info/2, terminate/2]).
-export_type([config/0, key/0, slot_opts/0, async_opts/0, info/0, slot_row/0]).

%% A pair of acquire and release costs little more than its two NIF calls, and is to stay so.
-compile({inline, [take/3, take/4, try_take/3, guard/0]}).

-type key() :: <<_:256>>.
-type config() :: #{
    max_concurrent => pos_integer(),
    max_inflight_bytes => non_neg_integer() | infinity,
    host => module(),
    file_mode => non_neg_integer(),
    digest => blake3 | none,
    mac_key => {file, file:name_all()} | fun(() -> <<_:256>>),
    page_cache => keep | drop,
    slow_save_ms => pos_integer()
}.
%% How many saves run at once (default: twice the schedulers plus one); how many bytes of payload
%% they may hold together (default: `infinity'); the {@link erllama_cache_host} (default:
%% `erllama_cache_host_erllama'); the files' permissions (default: `8#600'); whether files get a
%% digest (default: `blake3' in tier `disk', `none' in tier `ram_file'); what all digests are keyed
%% with, if anything, and then every file has one; whether files stay in the page cache (default:
%% `keep', for what is saved is often loaded soon); how many milliseconds a save may take before it
%% is logged (default: 10,000).

-type async_opts() :: #{timeout => timeout(), detach => boolean()}.
%% How long to wait for a slot (default: 30 seconds); whether to go on when the caller dies
%% (default: `false').

-type slot_opts() :: #{weight => pos_integer()}.
-type info() :: #{
    limit := pos_integer(),
    current := non_neg_integer(),
    max_inflight_bytes := non_neg_integer() | infinity,
    inflight_bytes := non_neg_integer(),
    waiting := non_neg_integer(),
    granted := non_neg_integer(),
    timed_out := non_neg_integer(),
    owner_died := non_neg_integer(),
    waited := non_neg_integer(),
    longest_wait_us := non_neg_integer(),
    mean_wait_us := non_neg_integer(),
    saves := non_neg_integer(),
    saved_bytes := non_neg_integer(),
    save_errors := non_neg_integer(),
    refused := non_neg_integer(),
    adoptions := non_neg_integer(),
    replacements := non_neg_integer(),
    sync_failures := non_neg_integer(),
    save_time := erllama_cache_metrics:histogram(),
    wait_time := erllama_cache_metrics:histogram()
}.
-type slot_row() :: #{
    pid := pid(), weight := pos_integer(), bytes := non_neg_integer(), ms := non_neg_integer()
}.

%% The one entry that this module makes in a process's dictionary.
-define(GUARD, '$erllama_cache_guard').
%% Where the semaphore and the configuration are, for processes that must not ask a server.
-define(STATE, ?MODULE).

-define(DEFAULT_TIMEOUT, 30000).
%% Milliseconds within which a server ends whose supervisor has ended.
-define(ENDS_WITHIN, 1000).

%% @doc What an error's reason means, in words for a person, in the manner of
%% {@link file:format_error/1}. It takes the reasons of this module and of
%% {@link erllama_cache_store}, with or without the `{error, _}' around them.
%%
%% ```
%% "no slot became free in time" = erllama_cache_writer:format_error(max_concurrent).
%% '''
-spec format_error(Reason :: term()) -> string().
format_error(Reason) ->
    erllama_cache_error:format(Reason).

%%% The server

%% @doc Starts the writer with its configuration from the environment: the limit from
%% `writer_max_concurrent' of application `erllama', then `max_concurrent' of this one; everything
%% else from this one. A supervisor's child is
%%
%% ```
%% #{id => erllama_cache_writer, start => {erllama_cache_writer, start_link, []}}
%% '''
%%
%% Raises `{invalid_config, Key, Value}' for a value that cannot be. Errors:
%% `{already_started, Pid}'; `{mac_key, Reason}', the secret cannot be read.
-spec start_link() -> {ok, pid()} | {error, term()}.
start_link() ->
    start(maps:merge(erllama_cache_config:environment(), erllama_cache_config:erllama_limit())).

%% @doc Starts the writer with a limit, or with a configuration; what that leaves out comes from the
%% environment of `erllama_cache_nif', then from the defaults. Raises and fails as
%% {@link start_link/0}.
%%
%% ```
%% {ok, Pid} = erllama_cache_writer:start_link(#{host => erllama_cache_store, max_concurrent => 4}).
%% '''
-spec start_link(pos_integer() | config()) -> {ok, pid()} | {error, term()}.
start_link(Limit) when ?IS_LIMIT(Limit) ->
    start((erllama_cache_config:environment())#{max_concurrent => Limit});
start_link(Config) when is_map(Config) ->
    start(maps:merge(erllama_cache_config:environment(), Config)).

start(Config) ->
    start_server(erllama_cache_config:complete(Config)).

%% A supervisor that was killed may be there again before the server of the one before has ended,
%% which traps exits. Told `already_started', it would give up.
start_server(Config) ->
    case gen_server:start_link({local, ?MODULE}, ?MODULE, Config, []) of
        {error, {already_started, Pid}} = Error ->
            case is_orphan(Pid) andalso ends_within(Pid, ?ENDS_WITHIN) of
                true -> start_server(Config);
                false -> Error
            end;
        Started ->
            Started
    end.

%% Whether the process that started this one is gone. If it had a name, that may be another's by
%% now: the two are linked while it lives.
is_orphan(Pid) ->
    case process_info(Pid, [dictionary, links]) of
        undefined ->
            true;
        [{dictionary, Dictionary}, {links, Links}] ->
            case proplists:get_value('$ancestors', Dictionary, []) of
                [Parent | _] when is_atom(Parent) -> not lists:member(whereis(Parent), Links);
                [Parent | _] -> not is_process_alive(Parent);
                [] -> false
            end
    end.

ends_within(Pid, Timeout) ->
    Monitor = monitor(process, Pid),
    receive
        {'DOWN', Monitor, process, Pid, _} -> true
    after Timeout ->
        true = demonitor(Monitor, [flush]),
        false
    end.

%% @private
init(Config) ->
    case erllama_cache_secret:read(maps:get(mac_key, Config, undefined)) of
        {ok, Secret} -> open(maps:remove(mac_key, Config), Secret);
        {error, Reason} -> {stop, Reason}
    end.

open(#{max_concurrent := Limit, max_inflight_bytes := MaxBytes} = Config, Secret) ->
    %% So that terminate/2 runs when the supervisor says shutdown.
    process_flag(trap_exit, true),
    Semaphore = semaphore(),
    ok = erllama_cache_turn:setup(),
    ok = erllama_cache_metrics:setup(),
    {ok, Hostname} = inet:gethostname(),
    persistent_term:put(?STATE, Config#{
        semaphore => Semaphore,
        options => #{
            disk => save_options(blake3, Secret, Config),
            ram_file => save_options(none, Secret, Config)
        },
        defaults => #{hostname => unicode:characters_to_binary(Hostname)}
    }),
    ok = erllama_cache_nif:semaphore_open(Semaphore, Limit, MaxBytes),
    ok = erllama_cache_abandon:after_crash_of(self(), Semaphore),
    {ok, Semaphore}.

save_options(Digest, none, #{file_mode := Mode, page_cache := PageCache} = Config) ->
    {Mode, maps:get(digest, Config, Digest), PageCache};
save_options(_Digest, Secret, #{file_mode := Mode, page_cache := PageCache}) ->
    %% A file without a keyed digest would not be loaded.
    {Mode, Secret, PageCache}.

%% The semaphore of the server before this one, if there was one: with it come the slots that are
%% held and those who wait. One of a library that was purged since is nobody's any more.
semaphore() ->
    case persistent_term:get(?STATE, undefined) of
        #{semaphore := Semaphore} ->
            try erllama_cache_nif:semaphore_limit(Semaphore) of
                _ -> Semaphore
            catch
                error:badarg -> erllama_cache_nif:semaphore_new()
            end;
        undefined ->
            erllama_cache_nif:semaphore_new()
    end.

%% @private
handle_call(_Request, _From, Semaphore) ->
    {reply, {error, unknown_call}, Semaphore}.

%% @private
handle_cast(_Request, Semaphore) ->
    {noreply, Semaphore}.

%% @private
handle_info(_Message, Semaphore) ->
    {noreply, Semaphore}.

%% @private
%% Stopped on purpose, the server sends its callers away. When it crashes they go on waiting: the
%% next server finds them in the queue.
terminate(Reason, Semaphore) ->
    case Reason of
        normal -> erllama_cache_nif:semaphore_close(Semaphore);
        shutdown -> erllama_cache_nif:semaphore_close(Semaphore);
        {shutdown, _} -> erllama_cache_nif:semaphore_close(Semaphore);
        _ -> ok
    end.

%%% Slots

%% @doc Takes a slot for the calling process, waiting at most `Timeout' milliseconds for it: 0 is
%% one try. Acquires may be nested; each {@link release/0} gives back the latest. A slot whose owner
%% dies comes back by itself.
%%
%% ```
%% ok = erllama_cache_writer:acquire(5000),
%% ok = erllama_cache_writer:release().
%% '''
%%
%% Error: `max_concurrent', none became free in time. Exits with `{noproc, _}' when no writer runs.
-spec acquire(timeout()) -> ok | {error, max_concurrent}.
acquire(Timeout) when ?IS_TIMEOUT(Timeout) ->
    %% The usual case first: a slot is free, and all that is wanted is to have it.
    case try_acquire() of
        ok -> ok;
        _ -> acquired(take(1, 0, Timeout), [Timeout])
    end.

try_acquire() ->
    case get(?GUARD) of
        undefined -> no_guard;
        Guard -> erllama_cache_nif:try_acquire(Guard)
    end.

acquired({error, _} = Error, _Args) -> Error;
acquired(closed, Args) -> exit_noproc(acquire, Args);
acquired(_Guard, _Args) -> ok.

%% @doc As {@link acquire/1}, for `weight' slots at once (default 1). Heavy and light requests are
%% served in one order, so a heavy one is never starved. One above the limit could never be served
%% and is refused: `weight_exceeds_limit'.
%%
%% ```
%% ok = erllama_cache_writer:acquire(infinity, #{weight => 2}),
%% ok = erllama_cache_writer:release().
%% '''
-spec acquire(timeout(), slot_opts()) ->
    ok | {error, max_concurrent | weight_exceeds_limit}.
acquire(Timeout, Opts) when ?IS_TIMEOUT(Timeout), is_map(Opts) ->
    case take(weight(Opts), 0, Timeout) of
        {error, _} = Error -> Error;
        closed -> exit_noproc(acquire, [Timeout, Opts]);
        _Guard -> ok
    end.

weight(Opts) ->
    case maps:get(weight, Opts, 1) of
        Weight when ?IS_LIMIT(Weight) -> Weight;
        _ -> error(badarg)
    end.

%% @doc Gives back what the calling process acquired last, all of its weight; does nothing when it
%% holds nothing.
%%
%% ```
%% ok = erllama_cache_writer:release().
%% '''
-spec release() -> ok.
release() ->
    case get(?GUARD) of
        undefined ->
            ok;
        Guard ->
            _ = erllama_cache_nif:release(Guard),
            ok
    end.

%% @doc Runs `Fun' with a slot and returns what it returns, or why there was no slot. The slot is
%% given back when `Fun' ends, however it ends.
%%
%% ```
%% 42 = erllama_cache_writer:with_slot(5000, fun() -> 6 * 7 end).
%% '''
-spec with_slot(timeout(), fun(() -> Result)) -> Result | {error, max_concurrent}.
with_slot(Timeout, Fun) when ?IS_TIMEOUT(Timeout), is_function(Fun, 0) ->
    case take(1, 0, Timeout) of
        {error, _} = Error ->
            Error;
        closed ->
            exit_noproc(with_slot, [Timeout, Fun]);
        Guard ->
            try
                Fun()
            after
                %% Not release/0: `Fun' may have erased the process's dictionary.
                erllama_cache_nif:release(Guard)
            end
    end.

take(Weight, Bytes, Timeout) ->
    take(Weight, Bytes, Timeout, never).

%% Returns the guard that the slot belongs to. A free slot is taken without a lock that anybody else
%% holds; only a caller that finds none pays for a reference and a place in the queue.
take(Weight, Bytes, Timeout, Stop) ->
    case guard() of
        closed ->
            closed;
        Guard ->
            case try_take(Guard, Weight, Bytes) of
                ok -> Guard;
                busy when Timeout =:= 0 -> refuse();
                busy -> wait(Guard, Weight, Bytes, Timeout, Stop);
                weight_exceeds_limit -> {error, weight_exceeds_limit};
                closed -> closed
            end
    end.

refuse() ->
    ok = erllama_cache_metrics:count(refused),
    {error, max_concurrent}.

try_take(Guard, 1, 0) -> erllama_cache_nif:try_acquire(Guard);
try_take(Guard, Weight, Bytes) -> erllama_cache_nif:try_acquire(Guard, Weight, Bytes).

wait(Guard, Weight, Bytes, Timeout, Stop) ->
    Ref = make_ref(),
    case erllama_cache_nif:acquire_or_queue(Guard, Weight, Bytes, Ref) of
        ok -> Guard;
        queued -> await(Guard, Ref, Timeout, Stop);
        weight_exceeds_limit -> {error, weight_exceeds_limit};
        closed -> closed
    end.

await(Guard, Ref, Timeout, never) ->
    receive
        {Ref, Verdict} -> verdict(Verdict, Guard)
    after Timeout -> leave(Guard, Ref, {error, max_concurrent})
    end;
await(Guard, Ref, Timeout, {Cancel, Monitors}) ->
    receive
        {Ref, Verdict} -> verdict(Verdict, Guard);
        {?MODULE, cancel, Cancel} -> stop_waiting(Guard, Ref);
        {'DOWN', Monitor, process, _, _} when [Monitor] =:= Monitors -> stop_waiting(Guard, Ref)
    after Timeout -> leave(Guard, Ref, {error, max_concurrent})
    end.

stop_waiting(Guard, Ref) ->
    case leave(Guard, Ref, {error, cancelled}) of
        Guard ->
            _ = erllama_cache_nif:release(Guard),
            {error, cancelled};
        Other ->
            Other
    end.

%% Leaves the queue with `Otherwise', unless it has been decided already what comes.
leave(Guard, Ref, Otherwise) ->
    case erllama_cache_nif:give_up(Guard) of
        withdrawn ->
            Otherwise;
        decided ->
            %% The message is in the mailbox or on its way. Left there it would be a stray one, and
            %% the slot that it tells of would be lost.
            receive
                {Ref, Verdict} -> verdict(Verdict, Guard)
            end
    end.

verdict(granted, Guard) -> Guard;
verdict(weight_exceeds_limit, _Guard) -> {error, weight_exceeds_limit};
verdict(closed, _Guard) -> closed.

%% One guard for each process, made when it first asks for a slot and kept until it dies.
guard() ->
    case get(?GUARD) of
        undefined ->
            case persistent_term:get(?STATE, undefined) of
                #{semaphore := Semaphore} ->
                    Guard = erllama_cache_nif:guard_new(Semaphore),
                    _ = put(?GUARD, Guard),
                    Guard;
                undefined ->
                    closed
            end;
        Guard ->
            Guard
    end.

-spec exit_noproc(atom(), list()) -> no_return().
exit_noproc(Function, Args) ->
    exit({noproc, {?MODULE, Function, Args}}).

%%% What is and what may be

%% @doc How many slots are held now.
%%
%% ```
%% 0 = erllama_cache_writer:current().
%% '''
-spec current() -> non_neg_integer().
current() ->
    erllama_cache_nif:semaphore_current(semaphore_of(current, [])).

%% @doc How many slots there are.
%%
%% ```
%% 4 = erllama_cache_writer:max_concurrent().
%% '''
-spec max_concurrent() -> pos_integer().
max_concurrent() ->
    erllama_cache_nif:semaphore_limit(semaphore_of(max_concurrent, [])).

%% @doc Changes how many slots there are, at once: more are handed to those who wait before this
%% returns; of fewer, nobody loses one, but nobody gets one until enough have come back.
%%
%% ```
%% ok = erllama_cache_writer:set_max_concurrent(4).
%% '''
-spec set_max_concurrent(pos_integer()) -> ok.
set_max_concurrent(Limit) when ?IS_LIMIT(Limit) ->
    erllama_cache_nif:semaphore_set_limit(semaphore_of(set_max_concurrent, [Limit]), Limit).

%% @doc Changes how many bytes of payload running saves may hold together. A payload above the bound
%% is saved alone rather than never.
%%
%% ```
%% ok = erllama_cache_writer:set_max_inflight_bytes(16 bsl 30).
%% '''
-spec set_max_inflight_bytes(non_neg_integer() | infinity) -> ok.
set_max_inflight_bytes(Bytes) when ?IS_BYTES(Bytes) ->
    Semaphore = semaphore_of(set_max_inflight_bytes, [Bytes]),
    erllama_cache_nif:semaphore_set_max_bytes(Semaphore, Bytes).

%% @doc The semaphore now, and what it and the saves have done since this node first started a
%% writer. Waits are in microseconds; `waited', `longest_wait_us' and `mean_wait_us' are of those
%% who had to queue, the histogram `wait_time' is of all saves. {@link
%% erllama_cache_metrics:format/1} prints the same for Prometheus.
%%
%% ```
%% #{limit := 4, waiting := 0, saves := Saves} = erllama_cache_writer:info().
%% '''
-spec info() -> info().
info() ->
    Semaphore = erllama_cache_nif:semaphore_info(semaphore_of(info, [])),
    maps:merge(Semaphore, erllama_cache_metrics:read()).

%% @doc Who holds slots: each acquire by itself, and for how many milliseconds. A process that has
%% been killed is among them for as long as its last write still runs.
%%
%% ```
%% [#{pid := Pid, weight := 1, bytes := 0, ms := Ms}] =
%%     erllama_cache_writer:with_slot(0, fun erllama_cache_writer:holders/0).
%% '''
-spec holders() -> [slot_row()].
holders() ->
    rows(erllama_cache_nif:semaphore_holders(semaphore_of(holders, []))).

%% @doc Who waits for slots, the next to be served first, and for how many milliseconds.
%%
%% ```
%% [] = erllama_cache_writer:waiters().
%% '''
-spec waiters() -> [slot_row()].
waiters() ->
    rows(erllama_cache_nif:semaphore_waiters(semaphore_of(waiters, []))).

rows(Rows) ->
    [#{pid => Pid, weight => Weight, bytes => Bytes, ms => Ms} || {Pid, Weight, Bytes, Ms} <- Rows].

semaphore_of(Function, Args) ->
    #{semaphore := Semaphore} = state(Function, Args),
    Semaphore.

state(Function, Args) ->
    case persistent_term:get(?STATE, undefined) of
        undefined -> exit_noproc(Function, Args);
        State -> State
    end.

%%% Saving

%% @doc Saves `Payload' under the key that `Meta' makes, and returns when it is on the disk:
%% {@link save/5}, with 30 seconds to wait for a slot.
%%
%% ```
%% {ok, Key} = erllama_cache_writer:save(my_store, disk, Meta, Payload).
%% '''
-spec save(erllama_cache_host:tier_srv(), erllama_cache_host:tier(),
           erllama_cache_meta:build_meta(), binary()) ->
    {ok, key()} | {error, term()}.
save(TierSrv, Tier, Meta, Payload) ->
    save(TierSrv, Tier, Meta, Payload, ?DEFAULT_TIMEOUT).

%% @doc Saves `Payload' under the key that `Meta' makes, and returns when it is on the disk. It
%% waits at most `Timeout' milliseconds for a slot, 0 being one try; the save itself takes its time.
%%
%% ```
%% Meta = #{save_reason => cold, quant_bits => 16, fingerprint => Fingerprint,
%%          fingerprint_mode => safe, quant_type => f16, ctx_params_hash => CtxParamsHash,
%%          tokens => [1, 15043, 3186], context_size => 4096},
%% {ok, Key} = erllama_cache_writer:save(my_store, disk, Meta, Payload).
%% '''
%%
%% Errors: `max_concurrent', no slot in time, and nothing was done; `already_present', this key is
%% stored; `conflict', somebody else is saving it; `{missing_key, Key}', `{invalid_meta, Key}' and
%% `prefix_too_long', of the map; `expired', the reservation was lost; `tier_busy', the tier server
%% did not answer; `badarg' and `{unencodable, Encoding}', of the root's name;
%% `{read_back, What}', the file is not what was written; a POSIX reason as the module `file' has
%% them; and what the host itself answers. After any of them nothing is left behind, but for
%% `expired' when the file was published by then: it stays, and the host adopts it.
-spec save(erllama_cache_host:tier_srv(), erllama_cache_host:tier(),
           erllama_cache_meta:build_meta(), binary(), timeout()) ->
    {ok, key()} | {error, term()}.
save(TierSrv, Tier, Meta, Payload, Timeout) when
    is_atom(TierSrv),
    (Tier =:= disk orelse Tier =:= ram_file),
    is_map(Meta),
    is_binary(Payload),
    ?IS_TIMEOUT(Timeout)
->
    %% A save weighs its payload: see set_max_inflight_bytes/1.
    save(TierSrv, Tier, Meta, Payload, Timeout, never).

save(TierSrv, Tier, Meta, Payload, Timeout, Stop) ->
    Begun = erlang:monotonic_time(),
    case take(1, byte_size(Payload), Timeout, Stop) of
        {error, _} = Error ->
            Error;
        closed ->
            exit_noproc(save, [TierSrv, Tier, '_', '_', Timeout]);
        Guard ->
            Granted = erlang:monotonic_time(),
            Setup = state(save, []),
            try erllama_cache_save:run(Setup, Guard, TierSrv, Tier, Meta, Payload, Stop) of
                Result ->
                    ended(Result, TierSrv, Payload, Begun, Granted),
                    Result
            catch
                Class:Reason:Stack ->
                    ok = erllama_cache_metrics:count(save_errors),
                    erlang:raise(Class, Reason, Stack)
            after
                erllama_cache_nif:release(Guard)
            end
    end.

ended(Result, TierSrv, Payload, Begun, Granted) ->
    Waited = microseconds(Granted - Begun),
    Took = microseconds(erlang:monotonic_time() - Granted),
    ok = erllama_cache_metrics:observe(wait_time, Waited),
    case Result of
        {ok, Key} ->
            ok = erllama_cache_metrics:count(saves),
            ok = erllama_cache_metrics:count(saved_bytes, byte_size(Payload)),
            ok = erllama_cache_metrics:observe(save_time, Took),
            #{slow_save_ms := Slow} = state(save, []),
            Took > Slow * 1000 andalso report_slow(TierSrv, Key, Payload, Took, Waited),
            ok;
        {error, already_present} ->
            ok;
        {error, _} ->
            erllama_cache_metrics:count(save_errors)
    end.

microseconds(Native) ->
    erlang:convert_time_unit(Native, native, microsecond).

report_slow(TierSrv, Key, Payload, Took, Waited) ->
    ?LOG_WARNING(#{
        event => slow_save, tier_srv => TierSrv, key => Key, payload_bytes => byte_size(Payload),
        save_ms => Took div 1000, waited_ms => Waited div 1000
    }, ?LOG_META).

%% @doc As {@link save_async/5} with 30 seconds, cancelled when the caller dies.
-spec save_async(erllama_cache_host:tier_srv(), erllama_cache_host:tier(),
                 erllama_cache_meta:build_meta(), binary()) -> {ok, reference()}.
save_async(TierSrv, Tier, Meta, Payload) ->
    save_async(TierSrv, Tier, Meta, Payload, #{}).

%% @doc Saves in another process and returns at once. When the save has ended, the caller gets one
%% message, `{erllama_cache_writer, Ref, Result}', with what {@link save/5} returns, or
%% `{error, cancelled}', or `{error, {raised, Class, Reason, Stack}}' where that would raise, or
%% `{error, {saver_died, Reason}}' when somebody has killed the process that saved. The payload is
%% not copied, and must be a binary of its own: part of a larger one keeps all of that in memory.
%%
%% When the caller dies, the save is cancelled and leaves nothing, unless `detach' is `true'.
%%
%% ```
%% {ok, Ref} = erllama_cache_writer:save_async(my_store, disk, Meta, Payload),
%% %% Meanwhile the next tokens are decoded.
%% receive {erllama_cache_writer, Ref, {ok, Key}} -> Key end.
%% '''
-spec save_async(erllama_cache_host:tier_srv(), erllama_cache_host:tier(),
                 erllama_cache_meta:build_meta(), binary(), async_opts()) -> {ok, reference()}.
save_async(TierSrv, Tier, Meta, Payload, Opts) when
    is_atom(TierSrv),
    (Tier =:= disk orelse Tier =:= ram_file),
    is_map(Meta),
    is_binary(Payload),
    is_map(Opts)
->
    Detach = maps:get(detach, Opts, false),
    is_boolean(Detach) orelse error(badarg),
    Timeout = async_timeout(maps:get(timeout, Opts, ?DEFAULT_TIMEOUT)),
    _ = state(save_async, [TierSrv, Tier, '_', '_', Opts]),
    Save = fun(Stop) -> save(TierSrv, Tier, Meta, Payload, Timeout, Stop) end,
    {ok, erllama_cache_background:run(Save, Detach)}.

async_timeout(Timeout) when ?IS_TIMEOUT(Timeout) -> Timeout;
async_timeout(_) -> error(badarg).

%% @doc Cancels a save that {@link save_async/5} began: between two slices, so that it leaves
%% nothing. The save's caller is told `{error, cancelled}', or what it has come to, if the file was
%% about to get its name or the save had ended. It does nothing for any other reference; the
%% reference of a save is one on its own node only.
%%
%% ```
%% {ok, Ref} = erllama_cache_writer:save_async(my_store, disk, Meta, Payload),
%% ok = erllama_cache_writer:cancel(Ref),
%% receive {erllama_cache_writer, Ref, Result} -> Result end.
%% '''
-spec cancel(reference()) -> ok.
cancel(Ref) when is_reference(Ref) ->
    erllama_cache_background:cancel(Ref).
