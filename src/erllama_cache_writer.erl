%% @doc Saves KV state to disk, with a limit on how many saves run at once.
%%
%% A save takes a slot, reserves its key with the host, writes the payload to a temporary file,
%% checks and syncs it, publishes it under its final name, and announces it to the host, all in the
%% calling process. The payload is never copied. The slots belong to a fair semaphore in the NIF
%% library, and are released however their owners end. The server holds the configuration only.
-module(erllama_cache_writer).
-behaviour(gen_server).

-include("erllama_cache_limits.hrl").

-export([start_link/0, start_link/1]).
-export([save/4, save/5, save_async/4, save_async/5, cancel/1, flush/1]).
-export([format_error/1]).
-export([acquire/1, acquire/2, release/0, with_slot/2]).
-export([current/0, max_concurrent/0, set_max_concurrent/1, set_max_inflight_bytes/1]).
-export([info/0, holders/0, waiters/0]).
-export([init/1, handle_call/3, handle_cast/2, handle_info/2, terminate/2]).
-export_type([config/0, key/0, slot_opts/0, async_opts/0, save_error/0, info/0, slot_row/0]).

%% So that a pair of acquire and release costs little more than its two NIF calls.
-compile({inline, [take/3, take/4, try_take/3, guard/0]}).

-type key() :: <<_:256>>.
-type save_error() :: erllama_cache_error:save_error().
-type config() :: erllama_cache_config:config().
-type async_opts() :: #{timeout => timeout(), detach => boolean()}.
%% Milliseconds to wait for a slot (default: 30,000); whether the save goes on when the caller dies
%% (default: `false').

-type slot_opts() :: #{weight => pos_integer()}.
-type info() :: erllama_cache_metrics:info().
-type slot_row() :: #{
    pid := pid(), weight := pos_integer(), bytes := non_neg_integer(), ms := non_neg_integer(),
    behind := boolean()
}.

%% This module's one entry in a process's dictionary.
-define(GUARD, '$erllama_cache_guard').

-define(DEFAULT_TIMEOUT, 30000).
%% Milliseconds for pending saves when the writer is stopped: a supervisor gives it 5 seconds.
-define(DRAIN, 4500).
-define(IS_SAVE(TierSrv, Tier, Meta, Payload),
        is_atom(TierSrv), (Tier =:= disk orelse Tier =:= ram_file), is_map(Meta),
        is_binary(Payload)).

%% @doc Describes an error's reason in English, as {@link file:format_error/1} does. It accepts the
%% reasons of this module and of {@link erllama_cache_store}, with or without `{error, _}' around
%% them.
%%
%% ```
%% "no slot became free in time" = erllama_cache_writer:format_error(max_concurrent).
%% '''
-spec format_error(Reason :: term()) -> string().
format_error(Reason) ->
    erllama_cache_error:format(Reason).

%%% The server

%% @doc Starts the writer with the configuration in the environment of `erllama_cache_nif'. If
%% `writer_max_concurrent' of `erllama' is set, it is the limit. The child specification is
%%
%% ```
%% #{id => erllama_cache_writer, start => {erllama_cache_writer, start_link, []}}
%% '''
%%
%% Errors: `{already_started, Pid}'; `{mac_key, Reason}', the secret cannot be read;
%% `{unknown_host, Missing}', erllama lacks these functions. Raises `{invalid_config, Key, Value}'
%% for a wrong value and `{unknown_config, Key, Nearest}' for an unknown key.
-spec start_link() -> {ok, pid()} | {error, term()}.
start_link() ->
    start(maps:merge(erllama_cache_config:environment(), erllama_cache_config:erllama_limit())).

%% @doc Starts the writer with a limit or a configuration. Keys that it leaves out come from the
%% environment of `erllama_cache_nif', then from the defaults. Errors as of {@link start_link/0}.
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
    case erllama_cache_host:recognise(erllama_cache_config:complete(Config)) of
        {ok, Complete} -> erllama_cache_successor:start_link(?MODULE, ?MODULE, Complete);
        {error, _} = Error -> Error
    end.

%% @private
init(Config) ->
    case erllama_cache_secret:read(maps:get(mac_key, Config, undefined)) of
        {ok, Secret} -> open(maps:remove(mac_key, Config), Secret);
        {error, Reason} -> {stop, Reason}
    end.

open(#{max_concurrent := Limit, max_inflight_bytes := MaxBytes} = Config, Secret) ->
    %% So that terminate/2 runs when the supervisor shuts it down.
    process_flag(trap_exit, true),
    Semaphore = semaphore(),
    ok = erllama_cache_io_limit:setup(),
    ok = erllama_cache_counts:setup(),
    ok = erllama_cache_lend:setup(),
    {ok, Hostname} = inet:gethostname(),
    SaveOptions = erllama_cache_config:save_options(Config, Secret),
    ok = erllama_cache_setup:put(maps:merge(SaveOptions, Config#{
        semaphore => Semaphore,
        secret => Secret,
        borrower => erllama_cache_peer_tier:setup(Config, Secret),
        defaults => #{hostname => unicode:characters_to_binary(Hostname)}
    })),
    ok = erllama_cache_nif:semaphore_open(Semaphore, Limit, MaxBytes),
    ok = erllama_cache_abandon:after_crash_of(self(), Semaphore),
    {ok, Semaphore}.

%% The predecessor's, where there was one.
semaphore() ->
    Before = case erllama_cache_setup:find() of
        {ok, #{semaphore := Semaphore}} -> Semaphore;
        error -> undefined
    end,
    erllama_cache_successor:inherit(Before, fun erllama_cache_nif:semaphore_new/0).

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
%% A server that is stopped on purpose refuses its waiters, and gives the saves that nobody waits
%% for time while the host still lives. After a crash waiters go on waiting, and the next server
%% finds them in the queue.
terminate(Reason, Semaphore) ->
    case erllama_cache_successor:is_stop(Reason) of
        true ->
            ok = erllama_cache_nif:semaphore_close(Semaphore),
            %% For what is left, erllama_cache_drain waits.
            _ = erllama_cache_pending:flush(?DRAIN),
            ok;
        false ->
            ok
    end.

%%% Slots

%% @doc Acquires a slot for the calling process and waits at most `Timeout' milliseconds for it; 0
%% means one try. Acquires nest: each {@link release/0} releases the latest. When the owner dies,
%% its slots are released.
%%
%% ```
%% ok = erllama_cache_writer:acquire(5000),
%% ok = erllama_cache_writer:release().
%% '''
%%
%% Error: `max_concurrent', no slot became free in time. Exits with `{noproc, _}' when no writer
%% runs.
-spec acquire(timeout()) -> ok | {error, max_concurrent}.
acquire(Timeout) when ?IS_TIMEOUT(Timeout) ->
    %% The usual case first: a slot is free.
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

%% @doc Acquires `weight' slots at once (default 1), otherwise as {@link acquire/1}. Heavy and light
%% requests are served in one order, so light ones cannot starve a heavy one.
%%
%% ```
%% ok = erllama_cache_writer:acquire(infinity, #{weight => 2}),
%% ok = erllama_cache_writer:release().
%% '''
%%
%% Error: also `weight_exceeds_limit', for a weight that could never be granted.
-spec acquire(timeout(), slot_opts()) ->
    ok | {error, max_concurrent | weight_exceeds_limit}.
acquire(Timeout, Opts) when ?IS_TIMEOUT(Timeout), is_map(Opts) ->
    acquired(take(weight(Opts), 0, Timeout), [Timeout, Opts]).

weight(Opts) ->
    case maps:get(weight, Opts, 1) of
        Weight when ?IS_LIMIT(Weight) -> Weight;
        _ -> error(badarg)
    end.

%% @doc Releases what the calling process acquired last, with its whole weight. Does nothing if the
%% process holds nothing.
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

%% @doc Runs `Fun' with a slot and returns its result, or the reason why there was no slot. The slot
%% is released when `Fun' ends, however it ends.
%%
%% ```
%% {ok, 42} = erllama_cache_writer:with_slot(5000, fun() -> 6 * 7 end).
%% '''
-spec with_slot(timeout(), fun(() -> Result)) -> {ok, Result} | {error, max_concurrent}.
with_slot(Timeout, Fun) when ?IS_TIMEOUT(Timeout), is_function(Fun, 0) ->
    case take(1, 0, Timeout) of
        {error, _} = Error ->
            Error;
        closed ->
            exit_noproc(with_slot, [Timeout, Fun]);
        Guard ->
            try
                {ok, Fun()}
            after
                %% Not release/0: `Fun' may have erased the process's dictionary.
                erllama_cache_nif:release(Guard)
            end
    end.

take(Weight, Bytes, Timeout) ->
    take(Weight, Bytes, Timeout, never).

%% Returns the guard that holds the slot. A free slot is taken without a shared lock; only a caller
%% that finds none pays for a reference and a place in the queue.
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
    ok = erllama_cache_counts:count(refused),
    {error, max_concurrent}.

try_take(Guard, 1, 0) -> erllama_cache_nif:try_acquire(Guard);
try_take(Guard, Weight, Bytes) -> erllama_cache_nif:try_acquire(Guard, Weight, Bytes).

wait(Guard, Weight, Bytes, Timeout, Stop) ->
    case erllama_cache_waiter:wait(Guard, Weight, Bytes, Timeout, Stop) of
        granted -> Guard;
        timed_out -> {error, max_concurrent};
        stopped -> {error, cancelled};
        weight_exceeds_limit -> {error, weight_exceeds_limit};
        %% A detached save that had been accepted goes on without a slot: the shutdown waits for it.
        closed when element(2, Stop) =:= [] -> Guard;
        closed -> closed
    end.

%% Each process has one guard, made at its first acquire and kept until it dies.
guard() ->
    case get(?GUARD) of
        undefined ->
            case erllama_cache_setup:find() of
                {ok, #{semaphore := Semaphore}} ->
                    Guard = erllama_cache_nif:guard_new(Semaphore),
                    _ = put(?GUARD, Guard),
                    Guard;
                error ->
                    closed
            end;
        Guard ->
            Guard
    end.

-spec exit_noproc(atom(), list()) -> no_return().
exit_noproc(Function, Args) ->
    exit({noproc, {?MODULE, Function, Args}}).

%%% State and limits

%% @doc Returns how many slots are held.
%%
%% ```
%% 0 = erllama_cache_writer:current().
%% '''
-spec current() -> non_neg_integer().
current() ->
    erllama_cache_nif:semaphore_current(semaphore_of(current, [])).

%% @doc Returns the limit: how many slots there are.
%%
%% ```
%% 4 = erllama_cache_writer:max_concurrent().
%% '''
-spec max_concurrent() -> pos_integer().
max_concurrent() ->
    erllama_cache_nif:semaphore_limit(semaphore_of(max_concurrent, [])).

%% @doc Sets the limit, at once. A higher limit serves waiters before this returns. A lower one
%% takes no slot away, but grants none until enough have been released.
%%
%% ```
%% ok = erllama_cache_writer:set_max_concurrent(4).
%% '''
-spec set_max_concurrent(pos_integer()) -> ok.
set_max_concurrent(Limit) when ?IS_LIMIT(Limit) ->
    erllama_cache_nif:semaphore_set_limit(semaphore_of(set_max_concurrent, [Limit]), Limit).

%% @doc Sets how many bytes of payload running saves may hold together. A payload above the bound is
%% saved alone.
%%
%% ```
%% ok = erllama_cache_writer:set_max_inflight_bytes(16 bsl 30).
%% '''
-spec set_max_inflight_bytes(non_neg_integer() | infinity) -> ok.
set_max_inflight_bytes(Bytes) when ?IS_BYTES(Bytes) ->
    Semaphore = semaphore_of(set_max_inflight_bytes, [Bytes]),
    erllama_cache_nif:semaphore_set_max_bytes(Semaphore, Bytes).

%% @doc Returns the state of the semaphore, and the counts of slots and saves since this node first
%% started a writer. `waited', `longest_wait_us' and `mean_wait_us' describe acquires that queued;
%% the histogram `wait_time' covers all saves. {@link erllama_cache_metrics:format/1} prints the
%% same for Prometheus.
%%
%% ```
%% #{limit := 4, waiting := 0, saves := Saves} = erllama_cache_writer:info().
%% '''
-spec info() -> info().
info() ->
    Semaphore = erllama_cache_nif:semaphore_info(semaphore_of(info, [])),
    maps:merge(maps:merge(Semaphore, erllama_cache_counts:read()), erllama_cache_pending:info()).

%% @doc Lists the slots that are held, one row for each acquire, with the milliseconds since, and
%% whether it is for a save behind its caller. A killed process is listed for as long as its last
%% write runs.
%%
%% ```
%% {ok, [#{pid := Pid, weight := 1, bytes := 0, ms := Ms, behind := false}]} =
%%     erllama_cache_writer:with_slot(0, fun erllama_cache_writer:holders/0).
%% '''
-spec holders() -> [slot_row()].
holders() ->
    rows(erllama_cache_nif:semaphore_holders(semaphore_of(holders, []))).

%% @doc Lists the waiters, the next to be served first, with the milliseconds that each has waited.
%%
%% ```
%% [] = erllama_cache_writer:waiters().
%% '''
-spec waiters() -> [slot_row()].
waiters() ->
    rows(erllama_cache_nif:semaphore_waiters(semaphore_of(waiters, []))).

rows(Rows) ->
    Owners = erllama_cache_pending:owners(),
    [
        #{pid => Pid, weight => Weight, bytes => Bytes, ms => Ms,
          behind => erllama_cache_behind:is_saver(Pid, Owners)}
     || {Pid, Weight, Bytes, Ms} <- Rows
    ].

semaphore_of(Function, Args) ->
    map_get(semaphore, state(Function, Args)).

state(Function, Args) ->
    erllama_cache_setup:get(?MODULE, Function, Args).

%%% Saving

%% @doc Saves as {@link save/5}, with 30 seconds to wait for a slot.
%%
%% ```
%% {ok, Key} = erllama_cache_writer:save(my_store, disk, Meta, Payload).
%% '''
-spec save(erllama_cache_host:tier_srv(), erllama_cache_host:tier(),
           erllama_cache_meta:build_meta(), binary()) ->
    {ok, key()} | {error, term()}.
save(TierSrv, Tier, Meta, Payload) ->
    save(TierSrv, Tier, Meta, Payload, ?DEFAULT_TIMEOUT).

%% @doc Saves `Payload' under the key made from `Meta', and returns when it is on the disk. It waits
%% at most `Timeout' milliseconds for a slot, 0 being one try; the timeout does not end a save that
%% runs.
%%
%% ```
%% Meta = #{save_reason => cold, quant_bits => 16, fingerprint => Fingerprint,
%%          fingerprint_mode => safe, quant_type => f16, ctx_params_hash => CtxParamsHash,
%%          tokens => [1, 15043, 3186], context_size => 4096},
%% {ok, Key} = erllama_cache_writer:save(my_store, disk, Meta, Payload).
%% '''
%%
%% Errors: `max_concurrent', no slot in time, and nothing was done; `already_present', the key is
%% stored; `conflict', another process is saving it; `{missing_key, Key}', `{invalid_meta, Key}' and
%% `prefix_too_long', about `Meta'; `expired', the reservation was lost; `tier_busy', the tier
%% server did not answer; `badarg' and `{unencodable, Encoding}', about the root's name;
%% `{read_back, What}', the file differs from what was written; a POSIX reason as in the module
%% `file'; and the host's own errors. After an error nothing is left behind, except after
%% `expired' once the file was published: it stays, and the host adopts it.
-spec save(erllama_cache_host:tier_srv(), erllama_cache_host:tier(),
           erllama_cache_meta:build_meta(), binary(), timeout()) ->
    {ok, key()} | {error, term()}.
save(TierSrv, Tier, Meta, Payload, Timeout) when
    ?IS_SAVE(TierSrv, Tier, Meta, Payload), ?IS_TIMEOUT(Timeout)
->
    case erllama_cache_setup:find() of
        {ok, #{write_behind := WriteBehind} = Setup} when WriteBehind =/= off ->
            case erllama_cache_behind:place(Meta, Payload, WriteBehind) of
                behind ->
                    answered(erllama_cache_behind:save(Setup, TierSrv, Tier, Meta, Payload),
                             [TierSrv, Tier, '_', '_', Timeout]);
                {in_line, Least} ->
                    save(TierSrv, Tier, Meta, Payload, max(Timeout, Least), never)
            end;
        _ ->
            save(TierSrv, Tier, Meta, Payload, Timeout, never)
    end.

answered(closed, Args) -> exit_noproc(save, Args);
answered(Answer, _Args) -> Answer.

save(TierSrv, Tier, Meta, Payload, Timeout, Stop) ->
    Begun = erlang:monotonic_time(),
    Early = erllama_cache_save:early_root(TierSrv, Stop),
    case take(1, byte_size(Payload), Timeout, Stop) of
        {error, _} = Error ->
            Error;
        closed ->
            exit_noproc(save, [TierSrv, Tier, '_', '_', Timeout]);
        Guard ->
            Granted = erlang:monotonic_time(),
            Setup = maps:merge(state(save, []), Early),
            Run = fun() ->
                erllama_cache_save:run(Setup, Guard, TierSrv, Tier, Meta, Payload, Stop)
            end,
            try
                erllama_cache_save:counted(Run, {TierSrv, byte_size(Payload)}, Begun, Granted)
            after
                erllama_cache_nif:release(Guard)
            end
    end.

%% @doc Saves as {@link save_async/5}, with its defaults.
-spec save_async(erllama_cache_host:tier_srv(), erllama_cache_host:tier(),
                 erllama_cache_meta:build_meta(), binary()) -> {ok, reference()}.
save_async(TierSrv, Tier, Meta, Payload) ->
    save_async(TierSrv, Tier, Meta, Payload, #{}).

%% @doc Saves in another process and returns at once. When the save has ended, the caller receives
%% `{erllama_cache_writer, Ref, Result}'. `Result' is that of {@link save/5}, or
%% `{error, cancelled}', or `{error, {raised, Class, Reason, Stack}}' if the save raised, or
%% `{error, {saver_died, Reason}}' if its process was killed. The payload is not copied, and should
%% not be part of a larger binary, which would stay in memory as long.
%%
%% When the caller dies, the save is cancelled and leaves nothing, unless `detach' is `true'.
%%
%% ```
%% {ok, Ref} = erllama_cache_writer:save_async(my_store, disk, Meta, Payload),
%% %% Meanwhile the caller decodes the next tokens.
%% receive {erllama_cache_writer, Ref, {ok, Key}} -> Key end.
%% '''
-spec save_async(erllama_cache_host:tier_srv(), erllama_cache_host:tier(),
                 erllama_cache_meta:build_meta(), binary(), async_opts()) -> {ok, reference()}.
save_async(TierSrv, Tier, Meta, Payload, Opts) when
    ?IS_SAVE(TierSrv, Tier, Meta, Payload), is_map(Opts)
->
    Detach = maps:get(detach, Opts, false),
    is_boolean(Detach) orelse error(badarg),
    Timeout = maps:get(timeout, Opts, ?DEFAULT_TIMEOUT),
    ?IS_TIMEOUT(Timeout) orelse error(badarg),
    _ = state(save_async, [TierSrv, Tier, '_', '_', Opts]),
    Save = fun(Stop) -> save(TierSrv, Tier, Meta, Payload, Timeout, Stop) end,
    {ok, erllama_cache_background:run(Save, Detach)}.

%% @doc Cancels a save that {@link save_async/5} began, between two slices, so that it leaves
%% nothing. Its caller receives `{error, cancelled}', or the save's result if the file was being
%% published or the save had ended. Does nothing for any other reference. The reference is valid
%% on its own node.
%%
%% ```
%% {ok, Ref} = erllama_cache_writer:save_async(my_store, disk, Meta, Payload),
%% ok = erllama_cache_writer:cancel(Ref),
%% receive {erllama_cache_writer, Ref, Result} -> Result end.
%% '''
-spec cancel(reference()) -> ok.
cancel(Ref) when is_reference(Ref) ->
    erllama_cache_background:cancel(Ref).

%% @doc Waits until the saves that are pending now have ended, at most `Timeout' milliseconds: those
%% behind their callers, and those of {@link save_async/5} that are detached. After `ok' each of
%% them is on the disk, or its failure has been logged and counted.
%%
%% ```
%% ok = erllama_cache_writer:flush(5000).
%% '''
%%
%% Error: `{pending, N}', so many of them are still pending.
-spec flush(timeout()) -> ok | {error, {pending, pos_integer()}}.
flush(Timeout) when ?IS_TIMEOUT(Timeout) ->
    erllama_cache_pending:flush(Timeout).
