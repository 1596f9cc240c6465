%% Everything that uses a store, together, for as long as one likes; then everything that was taken
%% has to be back where it began. run.sh runs it and says what it proves.
%%
%% What a key holds is a function of its number, so every load can be compared with what was saved,
%% whoever saved it, and nobody has to remember anything.
%%
%% When the store may refuse a save is another matter: no room, a conflict, a reservation that is
%% lost. This module is the savers' host and keeps a ledger of all reservations. A refusal that the
%% ledger does not account for is an error.
%%
%% Saves of the reason `cold' go on behind their callers, all others are in line.
-module(erllama_cache_soak).
-behaviour(erllama_cache_host).

-export([main/0]).
-export([identify/2, reserve/4, root/1, check/3, mark_published/4, announce/6, cancel/3, count/2]).
-export([log/2]).

-include("erllama_cache_index.hrl").

-define(WRITER, erllama_cache_writer).
-define(STORE, soak_store).
%% Several times what the store may hold.
-define(KEYS, 600).
-define(MAX_BYTES, (32 bsl 20)).
%% Takes several slices to save and to load.
-define(HUGE, (24 bsl 20)).
-define(LARGE, (2 bsl 20)).
-define(MAX_LIMIT, 6).
%% Fewer may be pending than want to be, and one of the largest is pending almost alone. A save in
%% line waits for as long as it says.
-define(BEHIND, #{reasons => [cold], max => 4, max_bytes => 28 bsl 20, slot_ms => 0}).
%% Of so many milliseconds, for so many nobody begins to save in line or takes a slot.
-define(TIDE, 1000).
-define(EBB, 300).
%% How long what has ended may take to be gone.
-define(DEADLINE, 30000).
%% What memory may differ by between two points of rest: room for one of the largest payloads, for
%% allocators keep some of what was freed. In ten minutes, with half a million loads, fifty bytes
%% that each leaves behind are as much.
-define(MEMORY, ?HUGE).
%% How many saves a warm-up has at least, however slow the machine is.
-define(WARM, 1000).
%% All modules are loaded before anything is counted, so hardly anything is new.
-define(ATOMS, 16).

%% Threads that exist once, and only since they were needed first.
-define(STARTED_ONCE, [<<"erllama_reaper">>, <<"erllama_steward">>, <<"erllama_notes">>]).

-define(LEDGER, soak_ledger).
%% A save's reservation, from before the store is asked for it until the store has been told that it
%% is over; and then for as long as somebody asks who asked before that. Times are milliseconds.
-record(reservation, {
    id :: reference(),
    pid :: pid(),
    store :: pid() | undefined,
    key :: binary(),
    size :: non_neg_integer(),
    asked :: integer(),
    answered = false :: boolean(),
    %% When the store said last that it stands.
    stood :: integer(),
    ended = never :: integer() | never
}).

%% When the last save of a key ended, and what was dropped without a cause.
-define(OUTCOMES, soak_outcomes).

main() ->
    Seconds = list_to_integer(os:getenv("SOAK", "3600")),
    Root = os:getenv("SOAK_ROOT"),
    Csv = os:getenv("SOAK_CSV"),
    ok = logger:set_primary_config(level, error),
    Counts = counters:new(length(what()), [write_concurrency]),
    persistent_term:put(?MODULE, #{counts => Counts, root => Root}),
    load_all([kernel, stdlib, crypto, erllama_cache_nif]),
    ?LEDGER = ets:new(?LEDGER, [named_table, public, {keypos, #reservation.id}]),
    ?OUTCOMES = ets:new(?OUTCOMES, [named_table, public]),
    ok = logger:add_handler(?MODULE, ?MODULE, #{}),
    %% Each of them is counted.
    ok = logger:add_handler_filter(default, ?MODULE, {fun is_no_drop/2, none}),
    Keepers = start_servers(Root),
    %% All that is made on first use is made before anything is counted.
    WarmUp = max(5, Seconds div 20),
    CrashesBefore = warm_up(WarmUp, Root),
    Began = rest(Root),
    There = processes(),
    BooksBefore = books(began),
    io:format("soak: ~b s after a warm-up of ~b s, root ~ts~n", [Seconds, WarmUp, Root]),
    {ok, Out} = file:open(Csv, [write]),
    {Samples, Crashes} = work(Seconds, Root, Out),
    ok = file:close(Out),
    Ended = rest(Root),
    Since = processes() -- There,
    report(Samples, Began, Ended, Csv),
    Left = leave(Root),
    Dropped = dropped(),
    stop_servers(Keepers),
    Crashed = [{worker_crashed, Crash} || Crash <- CrashesBefore ++ Crashes],
    Wrong = judge(Began, Ended, Since) ++ Crashed ++ BooksBefore ++ Left ++ Dropped ++ idle(),
    [io:format("soak: WRONG: ~tp~n", [Each]) || Each <- Wrong],
    Wrong =:= [] andalso io:format("soak: everything is back where it began~n"),
    halt(case Wrong of [] -> 0; _ -> 1 end).

load_all(Applications) ->
    [
        begin
            case application:load(Application) of
                ok -> ok;
                {error, {already_loaded, Application}} -> ok
            end,
            {ok, Modules} = application:get_key(Application, modules),
            %% Some are of other systems.
            _ = code:ensure_modules_loaded(Modules)
        end
     || Application <- Applications
    ].

%%% The servers, which are stopped and killed under everybody

start_servers(Root) ->
    [keeper(fun() -> start_store(Root) end, ?STORE), keeper(fun start_writer/0, ?WRITER)].

start_store(Root) ->
    erllama_cache_store:start_link(?STORE, #{root => Root, max_bytes => ?MAX_BYTES}).

start_writer() ->
    ?WRITER:start_link(#{host => ?MODULE, max_concurrent => ?MAX_LIMIT, write_behind => ?BEHIND}).

%% Starts it again whenever it is gone.
keeper(Start, Name) ->
    Parent = self(),
    Keeper = spawn(fun() ->
        process_flag(trap_exit, true),
        {ok, Pid} = Start(),
        Parent ! {self(), started},
        keep(Start, Name, Pid)
    end),
    receive {Keeper, started} -> Keeper after ?DEADLINE -> error({no_start, Name}) end.

keep(Start, Name, Pid) ->
    receive
        {'EXIT', Pid, _} ->
            {ok, Next} = Start(),
            keep(Start, Name, Next);
        {stop, From} ->
            ok = gen_server:stop(Pid),
            From ! {self(), stopped}
    end.

stop_servers(Keepers) ->
    [
        begin
            Keeper ! {stop, self()},
            receive {Keeper, stopped} -> ok after ?DEADLINE -> error(no_stop) end
        end
     || Keeper <- Keepers
    ].

%%% The workers

warm_up(Seconds, Root) ->
    {_, Crashes} = work(Seconds, Root, ignore),
    %% Where workers crash, there may never be that many.
    case Crashes =:= [] andalso proplists:get_value(saves, counted()) < ?WARM of
        true -> warm_up(2, Root);
        false -> Crashes
    end.

%% A worker does one thing again and again until it is told to stop or killed. Who was killed is
%% followed by another.
work(Seconds, Root, Out) ->
    Deadline = now_ms() + Seconds * 1000,
    Jobs = lists:append([
        lists:duplicate(6, at_flood(fun saver/0)), lists:duplicate(3, at_flood(fun async_saver/0)),
        lists:duplicate(6, fun saver_behind/0), [fun killer_of_savers/0],
        lists:duplicate(4, fun loader/0), lists:duplicate(2, at_flood(fun holder/0)),
        [fun deleter/0, fun resizer/0, fun looker/0]
    ]),
    Workers = maps:from_list([{spawn_worker(Job), Job} || Job <- Jobs]),
    Restarter = spawn_link(fun restarter/0),
    {Left, Samples, Crashes} = supervise(Workers, Deadline, now_ms(), Root, Out, [], []),
    stop_all([Restarter | maps:keys(Left)]),
    {lists:reverse(Samples), Crashes}.

%% Saves behind their callers are served after all others: without an ebb they would never be.
at_flood(Job) ->
    fun() ->
        case erlang:system_time(millisecond) rem ?TIDE < ?EBB of
            true -> receive after 10 -> ok end;
            false -> Job()
        end
    end.

spawn_worker(Job) ->
    {Pid, _Monitor} = spawn_monitor(fun() -> worker(Job) end),
    Pid.

worker(Job) ->
    receive
        stop -> ok
    after 0 ->
        disturbed(Job),
        worker(Job)
    end.

%% Without a writer, or a store, whoever asks for one is told so. Everything else that is raised is
%% a worker's crash, and an error of this program's result; an answer that nobody expects, too.
disturbed(Job) ->
    try
        Job()
    catch
        exit:{noproc, _} -> pause(noproc);
        %% The store was killed while it was asked.
        exit:{killed, {gen_server, call, _}} -> pause(noproc);
        exit:{normal, {gen_server, call, _}} -> pause(noproc)
    end.

pause(What) ->
    count(What),
    receive after 1 -> ok end.

%% Samples each second, kills somebody now and then, and puts another in the place of each who died.
supervise(Workers, Deadline, Next, Root, Out, Samples, Crashes) ->
    Now = now_ms(),
    if
        Now >= Deadline ->
            {Workers, Samples, Crashes};
        Now >= Next ->
            Sample = sample(Root),
            write_sample(Out, Sample),
            supervise(Workers, Deadline, Next + 1000, Root, Out, [Sample | Samples], Crashes);
        true ->
            receive
                {'DOWN', _, process, Pid, Reason} when is_map_key(Pid, Workers) ->
                    {Job, Rest} = maps:take(Pid, Workers),
                    Again = Rest#{spawn_worker(Job) => Job},
                    Crash = [Reason || Reason =/= killed],
                    supervise(Again, Deadline, Next, Root, Out, Samples, Crash ++ Crashes)
            after min(Next - Now, rand:uniform(40)) ->
                Pids = maps:keys(Workers),
                exit(lists:nth(rand:uniform(length(Pids)), Pids), kill),
                count(kills),
                supervise(Workers, Deadline, Next, Root, Out, Samples, Crashes)
            end
    end.

stop_all(Pids) ->
    Monitors = [{Pid, monitor(process, Pid)} || Pid <- Pids],
    [Pid ! stop || Pid <- Pids],
    [
        receive
            {'DOWN', Monitor, process, Pid, _} -> ok
        after ?DEADLINE -> error({no_end, process_info(Pid, current_stacktrace)})
        end
     || {Pid, Monitor} <- Monitors
    ].

saver() ->
    N = rand:uniform(?KEYS),
    Timeout = pick([0, 20, 1000, infinity]),
    saved(?WRITER:save(?STORE, disk, meta(N), payload(N), Timeout)).

saved({ok, _}) -> count(saves);
saved({error, already_present}) -> count(present);
saved({error, max_concurrent}) -> count(busy);
saved({error, cancelled}) -> count(cancelled);
%% The ledger accounts for each of them: see below.
saved({error, conflict}) -> count(conflicts);
saved({error, expired}) -> count(expired);
saved({error, no_room}) -> count(no_room);
%% A save in the background tells of what it would have raised.
saved({error, {raised, exit, {noproc, _}, _}}) -> count(noproc);
saved({error, {raised, exit, {Reason, {gen_server, call, _}}, _}}) when
    Reason =:= killed; Reason =:= normal
->
    count(noproc);
saved(Other) ->
    error({unexpected, Other}).

async_saver() ->
    N = rand:uniform(?KEYS),
    Opts = #{detach => pick([true, false]), timeout => pick([0, 1000, infinity])},
    {ok, Ref} = ?WRITER:save_async(?STORE, disk, meta(N), payload(N), Opts),
    pick([true, false]) andalso ?WRITER:cancel(Ref),
    receive {?WRITER, Ref, Result} -> saved(Result) end.

%% Its caller may be killed in any of these calls, which changes nothing for the save.
saver_behind() ->
    N = rand:uniform(?KEYS),
    Begun = now_ms(),
    case ?WRITER:save(?STORE, disk, (meta(N))#{save_reason := cold}, payload(N), 0) of
        {ok, Key} ->
            count(behind),
            Owner = load_pending(N, Key),
            case pick([nothing, wait, flush]) of
                nothing -> ok;
                wait -> load_after_save(N, Key);
                flush -> flush(N, Key, Owner, Begun)
            end;
        {error, max_concurrent} ->
            pause(full);
        {error, {saver_died, killed}} ->
            count(saver_died);
        Other ->
            saved(Other)
    end.

%% What memory has of it, while it is pending, and what a load returns. Without a pending save that
%% may be nothing: others delete, evict, and kill savers.
load_pending(N, Key) ->
    Owner =
        case erllama_cache_pending:find(?STORE, Key) of
            {ok, Info, Payload, Pid} ->
                same(N, Info, Payload),
                count(from_memory),
                Pid;
            none ->
                none
        end,
    loaded(N, erllama_cache_reader:load(?STORE, Key)),
    Owner.

load_after_save(N, Key) ->
    case erllama_cache_reader:load(?STORE, Key, #{wait => pick([0, 10, infinity])}) of
        {error, timeout} -> count(busy);
        Loaded -> loaded(N, Loaded)
    end.

%% When it returns, the save is not pending any more, and has ended one way or the other.
flush(N, Key, Owner, Begun) ->
    case ?WRITER:flush(pick([0, 10, infinity])) of
        ok ->
            count(flushes),
            case erllama_cache_pending:find(?STORE, Key) of
                {ok, _, _, Owner} -> error({pending_after_flush, N});
                _ -> ok
            end,
            case ets:lookup(?OUTCOMES, Key) of
                [{Key, Ended}] when Ended >= Begun -> ok;
                Outcome -> error({not_ended_after_flush, N, Begun, Outcome})
            end;
        {error, {pending, Pending}} when Pending > 0 ->
            count(busy)
    end.

killer_of_savers() ->
    Rows = ?WRITER:holders() ++ ?WRITER:waiters(),
    case [Pid || #{pid := Pid, behind := true} <- Rows] of
        [] -> ok;
        Savers -> exit(pick(Savers), kill)
    end,
    %% They wait long: most are to come to their end.
    receive after 200 -> ok end.

loader() ->
    N = rand:uniform(?KEYS),
    {ok, Key} = erllama_cache_store:key(meta(N)),
    loaded(N, erllama_cache_store:load(?STORE, Key)).

loaded(N, {ok, Info, Payload}) ->
    same(N, Info, Payload),
    count(loads);
loaded(_N, miss) ->
    count(misses).

same(N, Info, Payload) ->
    is_same(N, Info, Payload) orelse error({wrong_bytes, N}).

is_same(N, #{tokens := Tokens}, Payload) ->
    Tokens =:= <<N:32/little, 7:32/little>> andalso Payload =:= payload(N).

holder() ->
    case ?WRITER:acquire(pick([0, 10, 1000]), #{weight => pick([1, 1, 2])}) of
        ok ->
            Hold = fun() -> receive after rand:uniform(3) -> ok end end,
            try
                ?WRITER:with_slot(pick([0, 5]), Hold)
            after
                ok = ?WRITER:release()
            end,
            count(held);
        {error, max_concurrent} ->
            count(busy);
        {error, weight_exceeds_limit} ->
            count(busy)
    end.

deleter() ->
    {ok, Key} = erllama_cache_store:key(meta(rand:uniform(?KEYS))),
    ok = erllama_cache_store:delete(?STORE, Key),
    count(deletes),
    receive after 2 -> ok end.

resizer() ->
    ok = ?WRITER:set_max_concurrent(rand:uniform(?MAX_LIMIT)),
    ok = ?WRITER:set_max_inflight_bytes(pick([infinity, 0, 65536, ?LARGE, ?HUGE])),
    count(resizes),
    receive after 5 -> ok end.

looker() ->
    #{} = ?WRITER:info(),
    _ = [?WRITER:holders(), ?WRITER:waiters()],
    #{} = erllama_cache_store:info(?STORE),
    receive after 10 -> ok end.

restarter() ->
    receive
        stop -> ok
    after 3000 + rand:uniform(4000) ->
        restart(whereis(pick([?STORE, ?WRITER]))),
        count(restarts),
        restarter()
    end.

%% It ends somehow; its keeper starts the next one.
restart(Pid) ->
    case pick([kill, stop]) of
        kill -> exit(Pid, kill);
        stop -> ok = gen_server:stop(Pid)
    end.

pick(List) ->
    lists:nth(rand:uniform(length(List)), List).

%%% The savers' host: the store, and a ledger of all reservations

identify(KeyedBy, Meta) ->
    erllama_cache_store:identify(KeyedBy, Meta).

reserve(Name, Tier, Key, Size) ->
    %% Of a save that the store's end has ended.
    ok = ended(),
    ok = settle_ledger(),
    Asked = now_ms(),
    ok = enter(#reservation{
        id = make_ref(), pid = self(), store = whereis(Name), key = Key, size = Size,
        asked = Asked, stood = Asked
    }),
    case erllama_cache_store:reserve(Name, Tier, Key, Size) of
        {ok, Token} ->
            ok = enter((get(reservation))#reservation{answered = true}),
            {ok, Token};
        {error, Reason} = Error ->
            Mine = get(reservation),
            Others = [Other || #reservation{ended = Ended} = Other <- ets:tab2list(?LEDGER),
                               Other =/= Mine, Ended =:= never orelse Ended >= Asked],
            ok = ended(),
            accounts_for(Reason, Mine, Others) orelse
                error({not_accounted_for, Reason, Mine, Others}),
            Error
    end.

accounts_for(already_present, _Mine, _Others) ->
    true;
accounts_for(conflict, #reservation{key = Key}, Others) ->
    lists:keymember(Key, #reservation.key, Others);
accounts_for(no_room, #reservation{size = Size}, Others) ->
    Size + lists:sum([Other#reservation.size || Other <- Others]) > ?MAX_BYTES;
accounts_for(_Other, _Mine, _Others) ->
    false.

root(Name) ->
    erllama_cache_store:root(Name).

check(Name, Key, Token) ->
    stood(Name, erllama_cache_store:check(Name, Key, Token)).

mark_published(Name, Key, Token, Root) ->
    stood(Name, erllama_cache_store:mark_published(Name, Key, Token, Root)).

announce(Name, Key, Token, Size, Header, Tokens) ->
    try
        Announced = erllama_cache_store:announce(Name, Key, Token, Size, Header, Tokens),
        Result = stood(Name, Announced),
        ok = ended(),
        Result
    after
        %% A store that is gone cannot say that the file is known.
        outcome(Key)
    end.

cancel(Name, Key, Token) ->
    ok = erllama_cache_store:cancel(Name, Key, Token),
    ended().

count(Name, Event) ->
    erllama_cache_store:count(Name, Event).

%% A reservation is lost with its store, or when nobody has renewed it for as long as its lease.
stood(_Name, ok) ->
    enter((get(reservation))#reservation{stood = now_ms()});
stood(Name, {error, expired} = Expired) ->
    #reservation{store = Store, stood = Stood} = Mine = get(reservation),
    ok = ended(),
    IsOver = now_ms() - Stood >= erllama_cache_host:lease(),
    whereis(Name) =/= Store orelse IsOver orelse error({not_accounted_for, expired, Mine}),
    Expired.

enter(Mine) ->
    _ = put(reservation, Mine),
    true = ets:insert(?LEDGER, Mine),
    ok.

ended() ->
    case erase(reservation) of
        undefined -> ok;
        Mine -> end_entry(Mine)
    end.

end_entry(Reservation) ->
    true = ets:insert(?LEDGER, Reservation#reservation{ended = now_ms()}),
    ok.

%% Who was killed has not said that its reservation is over; and what was over before anybody asked
%% who still does, nobody needs to know.
settle_ledger() ->
    Entries = ets:tab2list(?LEDGER),
    _ = [end_entry(Entry) || #reservation{ended = never, pid = Pid, key = Key} = Entry <- Entries,
                             not is_process_alive(Pid), not is_reserved(Pid, Key)],
    Asking = [Asked || #reservation{ended = never, answered = false, asked = Asked} <- Entries],
    Since = lists:min([now_ms() | Asking]),
    _ = [ets:delete(?LEDGER, Id)
         || #reservation{id = Id, ended = Ended} <- Entries, Ended =/= never, Ended < Since],
    ok.

%% A dead process has none when the server has answered everything that it was asked before, and
%% has done with a row that is not there any more.
is_reserved(Pid, Key) ->
    _ = gen_server:call(?STORE, audit, infinity),
    case erllama_cache_index:row(?STORE, Key) of
        #row{state = reserved, pid = Pid} ->
            true;
        _ ->
            _ = gen_server:call(?STORE, audit, infinity),
            false
    end.

%%% What becomes of saves behind their callers

outcome(Key) ->
    ets:insert(?OUTCOMES, {Key, now_ms()}).

is_no_drop(#{msg := {report, #{event := save_dropped}}}, none) -> stop;
is_no_drop(Event, none) -> Event.

%% As a handler of the logger: it runs in the process that answers for the save.
log(#{msg := {report, #{event := save_dropped, key := Hex, reason := Reason} = Report}}, _Config) ->
    count(dropped),
    is_cause(Reason) orelse ets:insert(?OUTCOMES, {{no_cause, make_ref()}, Report}),
    outcome(binary:decode_hex(Hex));
log(_Event, _Config) ->
    ok.

%% Somebody killed the saver, or stopped the store. That a reservation was lost, the ledger has
%% accounted for.
is_cause(expired) -> true;
is_cause({saver_died, killed}) -> true;
is_cause({raised, exit, {noproc, _}, _}) -> true;
is_cause({raised, exit, {Reason, {gen_server, call, _}}, _}) ->
    Reason =:= killed orelse Reason =:= normal;
is_cause(_) -> false.

%% All that was dropped had a cause, was logged, and was counted.
dropped() ->
    Logged = proplists:get_value(dropped, counted()),
    #{dropped := Counted} = ?WRITER:info(),
    NoCause = ets:match_object(?OUTCOMES, {{no_cause, '_'}, '_'}),
    NoCause ++ [{dropped, Logged, Counted} || Logged =/= Counted].

%% A soak in which these never happened has proven nothing of them.
idle() ->
    Least = [saves, loads, kills, restarts, behind, full, from_memory, flushes, dropped],
    [{never, What} || {What, 0} <- counted(), lists:member(What, Least)].

%%% What is saved

meta(N) ->
    #{
        save_reason => evict, quant_bits => 16, quant_type => f16, fingerprint => <<1:256>>,
        fingerprint_mode => safe, ctx_params_hash => <<2:256>>, tokens => [N, 7],
        context_size => 4096, hostname => <<>>
    }.

%% Mostly small, for these are many.
payload(N) ->
    Size =
        case N rem 20 of
            0 when N rem 200 =:= 0 -> ?HUGE - N;
            0 -> ?LARGE - N;
            1 -> 65536 + N * 17;
            _ -> 1 + (N * 7919) rem 65536
        end,
    Block = crypto:hash(sha256, <<N:64>>),
    binary:part(binary:copy(Block, Size div 32 + 1), 0, Size).

%%% What is counted and measured

what() ->
    [saves, present, busy, cancelled, conflicts, expired, no_room, noproc, behind, full,
     from_memory, flushes, dropped, saver_died, loads, misses, held, deletes, resizes, kills,
     restarts].

count(What) ->
    #{counts := Counts} = persistent_term:get(?MODULE),
    counters:add(Counts, index(What, what(), 1), 1).

index(What, [What | _], N) -> N;
index(What, [_ | Rest], N) -> index(What, Rest, N + 1).

counted() ->
    #{counts := Counts} = persistent_term:get(?MODULE),
    [{What, counters:get(Counts, index(What, what(), 1))} || What <- what()].

now_ms() ->
    erlang:monotonic_time(millisecond).

%% What has to come back.
measured() ->
    [
        {rss, rss()},
        {fds, length(element(2, file:list_dir("/proc/self/fd")))},
        {threads, threads()},
        {processes, erlang:system_info(process_count) - abandoners()},
        {abandoners, abandoners()},
        {ports, erlang:system_info(port_count)},
        {ets, length(ets:all())},
        {pending, maps:get(pending, erllama_cache_pending:info())},
        {atoms, erlang:system_info(atom_count)}
        | lists:sort(maps:to_list(erllama_cache_nif:live_objects()))
    ].

%% A writer that is killed leaves a process, for a minute, which tells those who wait if no other
%% writer comes.
abandoners() ->
    length([Pid || Pid <- processes(),
                   proc_lib:translate_initial_call(Pid) =:= {erllama_cache_abandon, init, 1}]).

%% Some the library starts once, when something happens that may not have happened before. A second
%% one of those counts.
threads() ->
    {ok, Ids} = file:list_dir("/proc/self/task"),
    Names = lists:append([thread_name(Id) || Id <- Ids]),
    length(Names) - length([Once || Once <- ?STARTED_ONCE, lists:member(Once, Names)]).

%% None if the thread has ended since it was listed.
thread_name(Id) ->
    case file:read_file(["/proc/self/task/", Id, "/comm"]) of
        {ok, Name} -> [string:trim(Name)];
        {error, _} -> []
    end.

rss() ->
    {ok, Status} = file:read_file("/proc/self/status"),
    {match, [KiB]} = re:run(Status, "VmRSS:\\s+(\\d+)", [{capture, all_but_first, list}]),
    list_to_integer(KiB) * 1024.

sample(Root) ->
    {ok, Names} = file:list_dir(Root),
    [{second, now_ms() div 1000}, {binaries, erlang:memory(binary)}, {files, length(Names)}] ++
        measured() ++ counted().

write_sample(ignore, _Sample) ->
    ok;
write_sample(Out, Sample) ->
    {ok, At} = file:position(Out, cur),
    {Names, Values} = lists:unzip(Sample),
    At =:= 0 andalso write_row(Out, [atom_to_list(Name) || Name <- Names]),
    write_row(Out, [integer_to_list(Value) || Value <- Values]).

write_row(Out, Cells) ->
    io:format(Out, "~ts~n", [lists:join($,, Cells)]).

%% Nothing runs, and what has ended is gone: everybody collects garbage until two looks see the same
%% and nobody holds or waits for anything.
rest(Root) ->
    rest(Root, none, now_ms() + ?DEADLINE).

rest(Root, Before, Deadline) ->
    now_ms() < Deadline orelse error({no_rest, Before}),
    %% Nobody is blamed for a server that is being started again.
    Idle = whereis(?WRITER) =/= undefined andalso whereis(?STORE) =/= undefined andalso
        ?WRITER:current() =:= 0 andalso ?WRITER:waiters() =:= [] andalso
        maps:get(reservations, erllama_cache_store:info(?STORE)) =:= 0 andalso
        ?WRITER:flush(0) =:= ok,
    [garbage_collect(Pid) || Pid <- processes()],
    Now = [Pair || {What, _} = Pair <- measured(), What =/= rss, What =/= abandoners],
    case Idle andalso Now =:= Before of
        true ->
            measured();
        false ->
            receive after 200 -> ok end,
            rest(Root, Now, Deadline)
    end.

%% What the store counts as used is what is there, and it watches over nobody; nor does the pending
%% set, of whose state nothing is left.
books(When) ->
    Store = case gen_server:call(?STORE, audit) of
        #{used := Used, should := Used, watches := 0} -> [];
        Books -> [{books, When, Books}]
    end,
    case sys:get_state(erllama_cache_pending) of
        {state, Saves, Monitors, 0, 0, []} when map_size(Saves) + map_size(Monitors) =:= 0 -> Store;
        State -> [{pending_set, When, State} | Store]
    end.

%% Everything that is stored still is what was saved; a store that looks at it anew knows all of it
%% and keeps it within the bound; deleted, it leaves nothing.
leave(Root) ->
    BooksAtRest = books(ended),
    Store = whereis(?STORE),
    ok = gen_server:stop(Store),
    ok = await_next(?STORE, Store, now_ms() + ?DEADLINE),
    #{files := Files} = erllama_cache_store:info(?STORE),
    Books = BooksAtRest ++ books(started_again),
    {ok, Names} = file:list_dir(Root),
    Bytes = lists:sum([filelib:file_size(filename:join(Root, Name)) || Name <- Names]),
    Keys = [{N, element(2, erllama_cache_store:key(meta(N)))} || N <- lists:seq(1, ?KEYS)],
    Found = [
        {N, is_same(N, FileInfo, Payload)}
     || {N, Key} <- Keys, {ok, FileInfo, Payload} <- [erllama_cache_store:load(?STORE, Key)]
    ],
    io:format("soak: at the end ~b files, ~b bytes~n", [length(Names), Bytes]),
    [ok = erllama_cache_store:delete(?STORE, Key) || {_, Key} <- Keys],
    {ok, Rest} = file:list_dir(Root),
    Books ++ books(emptied) ++ [{above_the_bound, Bytes} || Bytes > ?MAX_BYTES] ++
        [{unknown_files, length(Names) - Files} || length(Names) =/= Files] ++
        [{wrong_bytes, N} || {N, false} <- Found] ++
        [{files_that_load, length(Found), length(Names)} || length(Names) =/= length(Found)] ++
        [{left_behind, Rest} || Rest =/= []].

%% Its keeper starts the next one.
await_next(Name, Last, Deadline) ->
    now_ms() < Deadline orelse error({no_next, Name}),
    case whereis(Name) of
        Pid when is_pid(Pid), Pid =/= Last ->
            %% It answers once it has looked through its root.
            _ = sys:get_state(Name),
            ok;
        _ ->
            receive after 10 -> ok end,
            await_next(Name, Last, Deadline)
    end.

judge(Began, Ended, Since) ->
    [
        {What, Before, After, who(What, Since)}
     || {{What, Before}, {What, After}} <- lists:zip(Began, Ended),
        After > Before + allowed(What)
    ].

%% Those that were not there before; the servers are among them.
who(processes, Since) ->
    Asked = [registered_name, initial_call, current_stacktrace, dictionary, messages],
    [{Pid, process_info(Pid, Asked)} || Pid <- Since];
who(_What, _Since) ->
    [].

allowed(rss) -> ?MEMORY;
allowed(atoms) -> ?ATOMS;
allowed(abandoners) -> proplists:get_value(restarts, counted());
allowed(_) -> 0.

%%% The report

report(Samples, Began, Ended, Csv) ->
    io:format("~n~-12ts ~14ts ~14ts ~12ts~n", ["", "began", "ended", "may grow"]),
    [
        io:format("~-12ts ~14b ~14b ~12b~n", [What, Before, After, allowed(What)])
     || {{What, Before}, {What, After}} <- lists:zip(Began, Ended)
    ],
    io:format("~nDone, the warm-up included:~n"),
    [io:format("~12b ~ts~n", [Value, What]) || {What, Value} <- counted()],
    #{evictions := Evictions} = erllama_cache_store:info(?STORE),
    io:format("~12b evictions of the last store~n", [Evictions]),
    io:format("~nOver time, from ~ts:~n", [Csv]),
    Curves = [rss, binaries, files, fds, threads, processes, pending, guard, tmp, load],
    [curve(What, Samples) || What <- Curves],
    [rate(What, Samples) || What <- [saves, behind, loads]].

curve(What, Samples) ->
    draw(What, [proplists:get_value(What, Sample) || Sample <- Samples]).

%% How many a second.
rate(What, Samples) ->
    Values = [proplists:get_value(What, Sample) || Sample <- Samples],
    draw(What, lists:zipwith(fun(A, B) -> B - A end, lists:droplast(Values), tl(Values))).

%% A line of at most 60 characters, each the mean of its stretch of time, between least and most.
draw(What, Values) ->
    Width = max(1, (length(Values) + 59) div 60),
    Means = means(Values, Width),
    {Least, Most} = {lists:min(Values), lists:max(Values)},
    Line = [level(Mean, Least, Most) || Mean <- Means],
    io:format("~-10ts ~12b ~ts ~b~n", [What, Least, Line, Most]).

means(Values, Width) when length(Values) =< Width -> [mean(Values)];
means(Values, Width) ->
    {These, Rest} = lists:split(Width, Values),
    [mean(These) | means(Rest, Width)].

mean(Values) -> lists:sum(Values) / length(Values).

level(_Mean, Same, Same) -> 16#2581;
level(Mean, Least, Most) -> 16#2581 + min(7, trunc(8 * (Mean - Least) / (Most - Least))).
