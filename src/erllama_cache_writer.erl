%% @doc Saves KV state, a limited number of saves at a time.
%%
%% A save takes a slot, reserves its key with the host, writes the payload to a temporary file,
%% checks and syncs it, publishes it under its final name, and tells the host. Everything runs in
%% the calling process; the payload is never copied. The slots belong to a semaphore in the NIF
%% library: it is fair, nobody polls, and a slot comes back however its owner ends. The server of
%% this name owns the configuration, not the slots.
-module(erllama_cache_writer).
-behaviour(gen_server).

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
-define(MAX_TIMEOUT, 16#ffffffff).
-define(MAX_LIMIT, 16#7fffffff).
-define(MAX_BYTES, 16#ffffffffffffffff).
%% Up to this many bytes of file, a save is one call of the library.
-define(SMALL, 65536).

%% Milliseconds within which a server ends whose supervisor has ended.
-define(ENDS_WITHIN, 1000).

-define(IS_TIMEOUT(T),
        (T =:= infinity orelse (is_integer(T) andalso T >= 0 andalso T =< ?MAX_TIMEOUT))).
-define(IS_LIMIT(N), (is_integer(N) andalso N > 0 andalso N =< ?MAX_LIMIT)).
-define(IS_BYTES(N),
        (N =:= infinity orelse (is_integer(N) andalso N >= 0 andalso N =< ?MAX_BYTES))).

%% @doc What an error's reason means, in words for a person, in the manner of
%% {@link file:format_error/1}. It takes the reasons of this module and of
%% {@link erllama_cache_store}, with or without the `{error, _}' around them.
%%
%% ```
%% "no slot became free in time" = erllama_cache_writer:format_error(max_concurrent).
%% '''
-spec format_error(Reason :: term()) -> string().
format_error({error, Reason}) -> format_error(Reason);
format_error(max_concurrent) -> "no slot became free in time";
format_error(weight_exceeds_limit) -> "the weight is above the limit, so it could never be served";
format_error(cancelled) -> "the save was cancelled";
format_error(already_present) -> "the key is stored already";
format_error(conflict) -> "another process is saving the key";
format_error(expired) -> "the reservation of the key was lost to another process";
format_error(prefix_too_long) -> "prompt, tokens and texts are too long together";
format_error({missing_key, Key}) -> text("the build_meta has no ~tp", [Key]);
format_error({invalid_meta, Key}) -> text("the build_meta's ~tp has the wrong type or size", [Key]);
format_error({unknown_quant_byte, Byte}) ->
    text("the host's table does not name the build_meta's quant_type (byte ~w)", [Byte]);
format_error({read_back, What}) ->
    text("what was written did not come back the same (~ts)", [words(What)]);
format_error({corrupt, What}) -> text("the file is corrupt: ~ts", [words(What)]);
format_error(unauthenticated) -> "the file was not made with this node's secret";
format_error(not_regular) -> "under the key's name stands something that is not a regular file";
format_error({wrong_tier, Tier}) -> text("the store is for tier ~ts", [Tier]);
format_error(exceeds_max_bytes) -> "the file is larger than the store may be";
format_error(tier_busy) -> "the tier server, busy with loads, did not answer in time";
format_error(no_room) ->
    "running saves, or files that cannot be removed, leave too little room in the store";
format_error({mac_key, bad_key}) -> "the secret is not 32 bytes";
format_error({mac_key, raised}) -> "the function that gives the secret has raised";
format_error({mac_key, Reason}) -> text("the secret cannot be read: ~ts", [format_error(Reason)]);
format_error({errno, Number}) -> text("the system's error ~w", [Number]);
format_error(no_links) ->
    "the root's file system has neither links nor a rename that replaces nothing: use another one";
format_error(out_of_turn) -> "the library was called out of turn, which is a bug";
format_error(enokey) -> "the encryption key of the directory is not loaded";
format_error({raised, Class, Reason, _Stack}) -> text("the save raised ~tp: ~tp", [Class, Reason]);
format_error({saver_died, Reason}) -> text("the process that saved has died: ~tp", [Reason]);
format_error({unencodable, latin1}) ->
    "file names are Latin-1 in this VM, and the root's cannot be: start it with +fnu, "
    "or in a UTF-8 locale";
format_error({unencodable, Encoding}) ->
    text("the root's name cannot be encoded as file names are in this VM (~ts)", [Encoding]);
format_error(badarg) -> "the root's name is none, or has a NUL";
format_error(Reason) when is_atom(Reason) -> file:format_error(Reason);
format_error(Reason) -> text("~tp", [Reason]).

text(Format, Args) ->
    lists:flatten(io_lib:format(Format, Args)).

words(Name) ->
    string:replace(atom_to_list(Name), "_", " ", all).

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
    start(maps:merge(env_config(), erllama_limit())).

%% @doc Starts the writer with a limit, or with a configuration; what that leaves out comes from the
%% environment of `erllama_cache_nif', then from the defaults. Raises and fails as
%% {@link start_link/0}.
%%
%% ```
%% {ok, Pid} = erllama_cache_writer:start_link(#{host => erllama_cache_store, max_concurrent => 4}).
%% '''
-spec start_link(pos_integer() | config()) -> {ok, pid()} | {error, term()}.
start_link(Limit) when ?IS_LIMIT(Limit) ->
    start((env_config())#{max_concurrent => Limit});
start_link(Config) when is_map(Config) ->
    start(maps:merge(env_config(), Config)).

start(Config) ->
    Complete = maps:merge(default_config(), Config),
    ok = maps:foreach(fun check_config/2, Complete),
    start_server(Complete).

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

default_config() ->
    #{
        max_concurrent => erlang:system_info(schedulers) * 2 + 1,
        max_inflight_bytes => infinity,
        host => erllama_cache_host_erllama,
        file_mode => 8#600,
        page_cache => keep,
        slow_save_ms => 10000
    }.

env_config() ->
    Keys = [max_concurrent, max_inflight_bytes, host, file_mode, digest, mac_key, page_cache,
            slow_save_ms],
    maps:from_list([
        {Key, Value}
     || Key <- Keys, {ok, Value} <- [application:get_env(erllama_cache_nif, Key)]
    ]).

erllama_limit() ->
    case application:get_env(erllama, writer_max_concurrent) of
        {ok, Limit} when ?IS_LIMIT(Limit) -> #{max_concurrent => Limit};
        _ -> #{}
    end.

check_config(max_concurrent, Limit) when ?IS_LIMIT(Limit) -> ok;
check_config(max_inflight_bytes, Bytes) when ?IS_BYTES(Bytes) -> ok;
check_config(host, Host) when is_atom(Host) -> ok;
check_config(file_mode, Mode) when is_integer(Mode), Mode >= 0, Mode =< 8#777 -> ok;
check_config(digest, Digest) when Digest =:= blake3; Digest =:= none -> ok;
check_config(mac_key, {file, _Path}) -> ok;
check_config(mac_key, Fun) when is_function(Fun, 0) -> ok;
check_config(page_cache, PageCache) when PageCache =:= keep; PageCache =:= drop -> ok;
check_config(slow_save_ms, Ms) when is_integer(Ms), Ms > 0 -> ok;
check_config(mac_key, _Secret) -> error({invalid_config, mac_key, hidden});
check_config(Key, Value) -> error({invalid_config, Key, Value}).

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
    case take(1, 0, Timeout) of
        {error, _} = Error -> Error;
        closed -> exit_noproc(acquire, [Timeout]);
        _Guard -> ok
    end.

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
            try save_with_slot(Guard, TierSrv, Tier, Meta, Payload, Stop) of
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
    Caller = self(),
    Save = fun(Stop) -> save(TierSrv, Tier, Meta, Payload, Timeout, Stop) end,
    %% Nothing of it is waited for: the caller's next token is more urgent than this save.
    Messenger = spawn(fun() -> begin_for(Caller, Detach, Save) end),
    Ref = erllama_cache_nif:handle_new(Messenger),
    Messenger ! {Caller, Ref},
    {ok, Ref}.

begin_for(Caller, Detach, Save) ->
    Monitor = monitor(process, Caller),
    receive
        {Caller, Ref} ->
            true = demonitor(Monitor, [flush]),
            Self = self(),
            Saver = spawn_monitor(fun() ->
                Self ! {Ref, save_for(Caller, Ref, Detach, Save)}
            end),
            Caller ! {?MODULE, Ref, result_of(Saver, Ref)};
        {'DOWN', Monitor, process, Caller, _} ->
            ok
    end.

%% The saver may be killed, so somebody else tells the caller: this process, which does nothing that
%% anybody would kill it for.
result_of({Pid, Monitor} = Saver, Ref) ->
    receive
        {?MODULE, cancel, Ref} = Cancel ->
            Pid ! Cancel,
            result_of(Saver, Ref);
        {Ref, Result} ->
            true = demonitor(Monitor, [flush]),
            Result;
        {'DOWN', Monitor, process, Pid, Reason} ->
            {error, {saver_died, Reason}}
    end.

save_for(Caller, Ref, Detach, Save) ->
    Monitors = case Detach of
        true -> [];
        false -> [monitor(process, Caller)]
    end,
    try
        Save({Ref, Monitors})
    catch
        Class:Reason:Stack -> {error, {raised, Class, Reason, Stack}}
    end.

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
    case erllama_cache_nif:handle_pid(Ref) of
        none ->
            ok;
        Pid ->
            Pid ! {?MODULE, cancel, Ref},
            ok
    end.

%% Whether a save is to stop: it has been cancelled, or its caller has died.
stopped(never) ->
    false;
stopped({Ref, []}) ->
    receive
        {?MODULE, cancel, Ref} -> true
    after 0 -> false
    end;
stopped({Ref, [Monitor]}) ->
    receive
        {?MODULE, cancel, Ref} -> true;
        {'DOWN', Monitor, process, _, _} -> true
    after 0 -> false
    end.

%% What stops a save before its file has its name: `{Ref, [Monitor]}', a message that cancels it and
%% its caller's death.
-type stop() :: never | {reference(), [reference()]}.

%% One save: what it is about, and what has been found out on the way.
-record(save, {
    host :: module(),
    guard :: erllama_cache_nif:guard(),
    tier_srv :: erllama_cache_host:tier_srv(),
    tier :: erllama_cache_host:tier(),
    meta :: erllama_cache_meta:complete(),
    payload :: binary(),
    options :: erllama_cache_nif:save_options(),
    key :: key(),
    quant_byte :: byte(),
    tokens :: binary(),
    size :: pos_integer(),
    token :: erllama_cache_host:token(),
    stop :: stop(),
    renewed :: integer()
}).

save_with_slot(Guard, TierSrv, Tier, BuildMeta, Payload, Stop) ->
    #{host := Default, defaults := Defaults, options := #{Tier := Options}} = state(save, []),
    Host = host(TierSrv, Default),
    case erllama_cache_meta:complete(BuildMeta, Defaults) of
        {ok, Meta} ->
            case Host:identify(Meta) of
                {ok, {Key, QuantByte, Tokens}} ->
                    Size = file_size(Meta, Tokens, Payload),
                    case Host:reserve(TierSrv, Tier, Key, Size) of
                        {ok, Token} ->
                            save_reserved(#save{
                                host = Host, guard = Guard, tier_srv = TierSrv, tier = Tier,
                                meta = Meta, payload = Payload, options = Options, key = Key,
                                quant_byte = QuantByte,
                                tokens = Tokens, size = Size, token = Token, stop = Stop,
                                renewed = erlang:monotonic_time(millisecond)
                            });
                        {error, already_present} = Error ->
                            ok = Host:count(TierSrv, duplicate_dropped),
                            Error;
                        {error, _} = Error ->
                            Error
                    end;
                {error, _} = Error ->
                    Error
            end;
        {error, _} = Error ->
            Error
    end.

%% Beside erllama a node may have stores: each of them is its own host.
host(TierSrv, erllama_cache_host_erllama = Default) ->
    case erllama_cache_store:is_store(TierSrv) of
        true -> erllama_cache_store;
        false -> Default
    end;
host(_TierSrv, Host) ->
    Host.

%% What the file will take, for a host that makes room: exact but for the fixed fields and tags,
%% which are less than this.
file_size(#{prompt_text := Prompt, hostname := Hostname, erllama_version := Version,
            save_reason_detail := Detail}, Tokens, Payload) ->
    256 + byte_size(Prompt) + byte_size(Hostname) + byte_size(Version) + byte_size(Detail) +
        byte_size(Tokens) + byte_size(Payload).

%% The reservation is ours: whatever ends the save before the file is published gives it up.
save_reserved(#save{host = Host, tier_srv = TierSrv} = Save) ->
    try
        Root = Host:root(TierSrv),
        {Root, begin_write(native(Root), Save)}
    of
        {Root1, {ok, Outcome, Size, Header}} ->
            ok = count_outcome(Outcome),
            announce(Root1, Size, Header, Save);
        {Root1, {Progress, Tmp}} when Progress =:= ok; Progress =:= more ->
            save_begun(Progress, Root1, Tmp, Save);
        {_Root, {lost, Error}} ->
            Error;
        {_Root, {error, _} = Error} ->
            cancel_reservation(Save),
            Error
    catch
        Class:Reason:Stack ->
            cancel_after_exception(Save),
            erlang:raise(Class, Reason, Stack)
    end.

native({error, _} = Error) -> Error;
native(Root) -> erllama_cache_path:native(Root).

begin_write({ok, Path}, #save{size = Size} = Save) when Size =< ?SMALL ->
    %% The way to a dirty scheduler and back takes longer than the write of a few pages, so there is
    %% at most one way for all; the reservation, milliseconds old, is checked before it.
    case check(Save) of
        ok -> write_and_publish(Path, Save);
        {error, _} = Error -> {lost, Error}
    end;
begin_write({ok, Path}, #save{guard = Guard, key = Key, meta = Meta, quant_byte = QuantByte,
                              tokens = Tokens, payload = Payload, options = Options} = Save) ->
    in_turn(Save, fun(Turn) ->
        erllama_cache_nif:write_tmp(
            Turn, Guard, Path, Key, Meta, QuantByte, Tokens, Payload, Options
        )
    end);
begin_write({error, _} = Error, _Save) ->
    Error.

write_and_publish(Path, #save{tier = ram_file, guard = Guard, key = Key, meta = Meta,
                              quant_byte = QuantByte, tokens = Tokens, payload = Payload,
                              options = Options} = Save) ->
    Written = erllama_cache_nif:write_and_publish_in_memory(
        Guard, Path, Key, Meta, QuantByte, Tokens, Payload, Options
    ),
    case Written of
        on_device -> write_and_publish(Path, Save#save{tier = disk});
        _ -> Written
    end;
write_and_publish(Path, #save{guard = Guard, key = Key, meta = Meta, quant_byte = QuantByte,
                              tokens = Tokens, payload = Payload, options = Options} = Save) ->
    in_turn(Save, fun(Turn) ->
        erllama_cache_nif:write_and_publish(
            Turn, Guard, Path, Key, Meta, QuantByte, Tokens, Payload, Options
        )
    end).

%% A call of the library in its turn. On a disk that is slow the turn may be long in coming: the
%% lease is renewed meanwhile. If it is lost then, the call is not made.
in_turn(Save, Call) ->
    case erllama_cache_turn:run(Call, erllama_cache_host:renew_every(), fun() -> check(Save) end) of
        {gave_up, Error} -> {lost, Error};
        Result -> Result
    end.

%% There is a temporary file: a failed call has dropped it, everything else has to.
save_begun(Progress, Root, Tmp, Save) ->
    try write_rest(Progress, Tmp, Save) of
        written ->
            publish(Root, Tmp, Save);
        {failed, Error} ->
            cancel_reservation(Save),
            Error;
        {stopped, Error} ->
            ok = erllama_cache_nif:abort(Tmp),
            cancel_reservation(Save),
            Error;
        {lost, Error} ->
            %% The reservation is somebody else's by now, and not ours to cancel.
            ok = erllama_cache_nif:abort(Tmp),
            Error
    catch
        Class:Reason:Stack ->
            ok = erllama_cache_nif:abort(Tmp),
            cancel_after_exception(Save),
            erlang:raise(Class, Reason, Stack)
    end.

write_rest(Progress, Tmp, #save{stop = Stop} = Save) ->
    case stopped(Stop) of
        true -> {stopped, {error, cancelled}};
        false -> go_on(Progress, Tmp, Save)
    end.

go_on(ok, _Tmp, Save) ->
    case check(Save) of
        ok -> written;
        {error, _} = Error -> {lost, Error}
    end;
go_on(more, Tmp, #save{guard = Guard, payload = Payload} = Save) ->
    case renew(Save) of
        {ok, Renewed} ->
            Slice = fun(Turn) -> erllama_cache_nif:write_more(Turn, Guard, Tmp, Payload) end,
            case in_turn(Save, Slice) of
                {error, _} = Error -> {failed, Error};
                {lost, _} = Lost -> Lost;
                Progress -> write_rest(Progress, Tmp, Renewed)
            end;
        {error, _} = Error ->
            {lost, Error}
    end.

%% A disk that takes longer than the lease must not lose a save that goes well.
renew(#save{renewed = Renewed} = Save) ->
    Now = erlang:monotonic_time(millisecond),
    case Now - Renewed < erllama_cache_host:renew_every() of
        true ->
            {ok, Save};
        false ->
            case check(Save) of
                ok -> {ok, Save#save{renewed = Now}};
                {error, _} = Error -> Error
            end
    end.

check(#save{host = Host, tier_srv = TierSrv, key = Key, token = Token}) ->
    Host:check(TierSrv, Key, Token).

publish(Root, Tmp, Save) ->
    try in_turn(Save, publish_call(Tmp, Save)) of
        {lost, Error} ->
            ok = erllama_cache_nif:abort(Tmp),
            Error;
        Progress ->
            published(Progress, Root, Tmp, Save)
    catch
        Class:Reason:Stack ->
            ok = erllama_cache_nif:abort(Tmp),
            cancel_after_exception(Save),
            erlang:raise(Class, Reason, Stack)
    end.

published(more, Root, Tmp, Save) ->
    Renewed = renew_if_it_stands(Save),
    Meanwhile = fun() ->
        _ = renew_if_it_stands(Renewed),
        ok
    end,
    Call = publish_call(Tmp, Renewed),
    Progress = erllama_cache_turn:run(Call, erllama_cache_host:renew_every(), Meanwhile),
    published(Progress, Root, Tmp, Renewed);
published({ok, Outcome, Size, Header}, Root, _Tmp, Save) ->
    ok = count_outcome(Outcome),
    announce(Root, Size, Header, Save);
published({error, _} = Error, _Root, _Tmp, Save) ->
    cancel_reservation(Save),
    Error.

publish_call(Tmp, #save{guard = Guard}) ->
    fun(Turn) -> erllama_cache_nif:publish(Turn, Guard, Tmp) end.

%% The file may have its name already. Whether the reservation was lost, or the host does not
%% answer, is for mark_published to tell.
renew_if_it_stands(Save) ->
    try renew(Save) of
        {ok, Renewed} -> Renewed;
        {error, _} -> Save
    catch
        _:_ -> Save
    end.

count_outcome(linked) -> ok;
count_outcome(adopted) -> erllama_cache_metrics:count(adoptions);
count_outcome(replaced) -> erllama_cache_metrics:count(replacements).

%% The file stays from here on, whatever the host answers: it is whole, and the host adopts it.
announce(Root, Size, Header, #save{host = Host, tier_srv = TierSrv, key = Key, token = Token,
                                   tokens = Tokens, meta = #{save_reason := Reason}}) ->
    case Host:mark_published(TierSrv, Key, Token, Root) of
        ok ->
            case Host:announce(TierSrv, Key, Token, Size, Header, Tokens) of
                ok ->
                    ok = Host:count(TierSrv, {saved, Reason}),
                    {ok, Key};
                {error, _} = Error ->
                    Error
            end;
        {error, _} = Error ->
            Error
    end.

cancel_reservation(#save{host = Host, tier_srv = TierSrv, key = Key, token = Token}) ->
    ok = Host:cancel(TierSrv, Key, Token).

%% What is raised already is what the caller has to see. A host that cannot cancel either has no
%% reservation to leave behind, or forgets it when this process dies or its lease ends.
cancel_after_exception(Save) ->
    try
        cancel_reservation(Save)
    catch
        _:_ -> ok
    end.
