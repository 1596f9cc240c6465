%% The writer's server and its slots, as erllama calls them: starts, stops, crashes, supervisors;
%% acquire/1, release/0 and what becomes of a slot whose owner ends. Fairness, storms of kills and
%% wake-ups are in erllama_cache_semaphore_SUITE.
-module(erllama_cache_writer_SUITE).
-behaviour(supervisor).

-include("erllama_cache_erllama_util.hrl").
-include_lib("common_test/include/ct.hrl").
-include_lib("stdlib/include/assert.hrl").

-compile(export_all).

-import(erllama_cache_test_util, [
    eventually/1, actor/0, ask/2, tell/2, answer/2, kill/1, own_messages/0, stop/1
]).
-import(erllama_cache_erllama_util, [
    meta/0, meta/1, start_writer/1, restart_writer/1, wait_in_line/0, waiting/0, save/0, save/1,
    on_peer/2
]).

suite() ->
    erllama_cache_erllama_util:suite().

all() ->
    erllama_cache_erllama_util:all().

groups() ->
    erllama_cache_erllama_util:groups([
        {server, [], [
            server_has_its_name_and_is_alone,
            unknown_calls_are_answered,
            without_a_writer_calls_exit,
            stop_sends_waiters_away,
            slots_survive_a_stop,
            kill_loses_nobody,
            runs_as_a_permanent_child,
            supervisor_killed
        ]},
        {slots, [], [
            acquire_and_release_nest,
            slots_belong_to_the_calling_process,
            acquire_gives_up_in_time,
            waiters_are_served_in_order,
            a_higher_limit_is_handed_out_at_once,
            a_lower_limit_takes_nothing_away,
            a_slot_that_comes_with_the_timeout_is_taken,
            no_message_is_left_behind,
            a_process_keeps_two_entries_and_no_message,
            bad_arguments_match_no_clause
        ]},
        {owners, [], [
            owner_ends_in_any_way,
            owner_dies_waiting
        ]}
    ]).

%%% The server

server_has_its_name_and_is_alone(_Config) ->
    Pid = whereis(?WRITER),
    ?assert(is_pid(Pid)),
    ?assertEqual({error, {already_started, Pid}}, ?WRITER:start_link(5)),
    ?assertEqual(?LIMIT, ?WRITER:max_concurrent()).

unknown_calls_are_answered(_Config) ->
    Pid = whereis(?WRITER),
    [
        ?assertEqual({error, unknown_call}, gen_server:call(?WRITER, Unknown))
     || Unknown <- [unknown, {acquire, 1}, "?", {}]
    ],
    ok = gen_server:cast(?WRITER, unknown),
    ?WRITER ! unknown,
    ?assertEqual({error, unknown_call}, gen_server:call(?WRITER, still_there)),
    ?assertEqual(Pid, whereis(?WRITER)).

%% On a fresh node, where no writer has ever run, and where one has.
without_a_writer_calls_exit(_Config) ->
    on_peer(["erl"], fun() -> calls_exit_noproc() end),
    stop(?WRITER),
    ?assertExit({noproc, _}, ?WRITER:acquire(0)),
    ?assertExit({noproc, _}, ?WRITER:acquire(infinity)),
    ?assertExit({noproc, _}, ?WRITER:save(?TIER, disk, meta(), ?PAYLOAD)),
    ?assertEqual([], erllama_fake:calls()),
    ?assertEqual(ok, ?WRITER:release()).

calls_exit_noproc() ->
    ?assertExit({noproc, _}, ?WRITER:acquire(0)),
    ?assertExit({noproc, _}, ?WRITER:acquire(infinity)),
    ?assertExit({noproc, _}, ?WRITER:save(?TIER, disk, meta(), ?PAYLOAD, 0)),
    ?assertExit({noproc, _}, ?WRITER:current()),
    ?assertExit({noproc, _}, ?WRITER:max_concurrent()),
    ?assertExit({noproc, _}, ?WRITER:set_max_concurrent(1)),
    ?assertEqual(ok, ?WRITER:release()).

stop_sends_waiters_away(_Config) ->
    ok = ?WRITER:set_max_concurrent(1),
    ok = ?WRITER:acquire(0),
    Waiting = [wait_in_line() || _ <- [1, 2, 3]],
    Saver = actor(),
    Saving = tell(Saver, fun() -> ?WRITER:save(?TIER, disk, meta(), ?PAYLOAD, infinity) end),
    eventually(fun() -> length(?WRITER:waiters()) =:= 4 end),
    ok = gen_server:stop(?WRITER),
    [?assertExit({noproc, _}, answer(Actor, Ref)) || {Actor, Ref} <- [{Saver, Saving} | Waiting]],
    ?assertEqual([], erllama_fake:calls()),
    ?assertEqual(ok, ?WRITER:release()).

slots_survive_a_stop(_Config) ->
    ok = ?WRITER:acquire(0),
    _ = restart_writer(1),
    ?assertEqual(1, ?WRITER:current()),
    ?assertEqual({error, max_concurrent}, ask(actor(), fun() -> ?WRITER:acquire(0) end)),
    ok = ?WRITER:release(),
    ?assertEqual(0, ?WRITER:current()),
    ?assertEqual(ok, ?WRITER:acquire(0)),
    ok = ?WRITER:release().

%% Neither who holds nor who waits notices that there is another server.
kill_loses_nobody(_Config) ->
    ok = ?WRITER:set_max_concurrent(1),
    ok = ?WRITER:acquire(0),
    {Actor, Ref} = wait_in_line(),
    kill(whereis(?WRITER)),
    Newcomer = actor(),
    eventually(fun() ->
        try ask(Newcomer, fun() -> ?WRITER:acquire(0) end) of
            %% The semaphore has not been told of the death yet.
            {error, max_concurrent} -> false
        catch
            exit:{noproc, _} -> true
        end
    end),
    _ = start_writer(1),
    ?assertEqual(1, ?WRITER:current()),
    ?assertMatch([#{pid := Actor}], ?WRITER:waiters()),
    ok = ?WRITER:release(),
    ?assertEqual(ok, answer(Actor, Ref)),
    ?assertEqual(1, ?WRITER:current()),
    ?assertEqual(ok, ask(Actor, fun() -> ?WRITER:release() end)),
    ?assertEqual(0, ?WRITER:current()).

runs_as_a_permanent_child(_Config) ->
    stop(?WRITER),
    {ok, Supervisor} = supervisor:start_link(?MODULE, child_spec()),
    true = unlink(Supervisor),
    First = whereis(?WRITER),
    ok = ?WRITER:set_max_concurrent(1),
    ok = ?WRITER:acquire(0),
    kill(First),
    eventually(fun() -> not lists:member(whereis(?WRITER), [undefined, First]) end),
    eventually(fun() -> ?WRITER:max_concurrent() > 1 end),
    ?assertEqual(1, ?WRITER:current()),
    %% A shutdown sends away who waits, so it cannot have been a kill for taking too long.
    ok = ?WRITER:set_max_concurrent(1),
    {Actor, Ref} = wait_in_line(),
    ok = supervisor:terminate_child(Supervisor, ?WRITER),
    ?assertExit({noproc, _}, answer(Actor, Ref)),
    {ok, _} = supervisor:restart_child(Supervisor, ?WRITER),
    ok = ?WRITER:release(),
    ?assertMatch({ok, _}, save()),
    ok = gen_server:stop(Supervisor),
    ?assertEqual(undefined, whereis(?WRITER)).

child_spec() ->
    #{id => ?WRITER, start => {?WRITER, start_link, []}, restart => permanent, shutdown => 5000,
      type => worker, modules => [?WRITER]}.

%% As a supervisor.
%% It traps exits, so that it outlives its supervisor by a moment. The next one must not be told
%% that it is there already: it would give up, and the host with it.
supervisor_killed(_Config) ->
    stop(?WRITER),
    Below = #{id => below, type => supervisor, start => {supervisor, start_link,
              [{local, contract_cache_sup}, ?MODULE, child_spec()]}},
    [
        begin
            {ok, Top} = supervisor:start_link(?MODULE, Below),
            true = unlink(Top),
            Writer = whereis(?WRITER),
            %% Held for a moment, so that the next supervisor meets it.
            true = erlang:suspend_process(Writer),
            exit(whereis(contract_cache_sup), kill),
            receive after 5 -> true = erlang:resume_process(Writer) end,
            eventually(fun() ->
                Next = whereis(?WRITER),
                is_pid(Next) andalso Next =/= Writer
            end),
            %% It has its name before it has begun.
            {error, unknown_call} = gen_server:call(?WRITER, unknown),
            ?assert(is_process_alive(Top)),
            ?assertMatch({ok, _}, save(meta([N]))),
            %% A second one is refused at once all the same.
            ?assertMatch({error, {already_started, _}}, ?WRITER:start_link(1)),
            ok = gen_server:stop(Top)
        end
     || N <- lists:seq(1, 15)
    ],
    start_writer(?LIMIT).

init(ChildSpec) ->
    {ok, {#{}, [ChildSpec]}}.

%%% Slots

acquire_and_release_nest(_Config) ->
    Held = fun(N) -> ?assertEqual(N, ?WRITER:current()) end,
    ?assertEqual(ok, ?WRITER:release()),
    Held(0),
    [begin ?assertEqual(ok, ?WRITER:acquire(0)), Held(N) end || N <- [1, 2, 3]],
    ?assertEqual({error, max_concurrent}, ?WRITER:acquire(0)),
    Held(3),
    [begin ?assertEqual(ok, ?WRITER:release()), Held(N) end || N <- [2, 1, 0]],
    ?assertEqual(ok, ?WRITER:release()),
    Held(0).

slots_belong_to_the_calling_process(_Config) ->
    Actor = actor(),
    ok = ask(Actor, fun() -> ?WRITER:acquire(0) end),
    ?assertEqual(ok, ?WRITER:release()),
    ?assertEqual(1, ?WRITER:current()),
    kill(Actor),
    eventually(fun() -> ?WRITER:current() =:= 0 end).

acquire_gives_up_in_time(_Config) ->
    ok = ?WRITER:set_max_concurrent(1),
    ok = ?WRITER:acquire(infinity),
    Actor = actor(),
    [
        ?assertEqual({error, max_concurrent}, ask(Actor, fun() -> ?WRITER:acquire(Ms) end))
     || Ms <- [0, 1, 20]
    ],
    ?assertEqual([], ?WRITER:waiters()),
    ?assertEqual(1, ?WRITER:current()),
    ok = ?WRITER:release(),
    ?assertEqual(0, ?WRITER:current()),
    ?assertEqual(ok, ask(Actor, fun() -> ?WRITER:acquire(0) end)),
    ok = ask(Actor, fun() -> ?WRITER:release() end).

waiters_are_served_in_order(_Config) ->
    ok = ?WRITER:set_max_concurrent(1),
    ok = ?WRITER:acquire(0),
    Line = [wait_in_line() || _ <- lists:seq(1, 5)],
    ok = ?WRITER:release(),
    lists:foreach(
        fun({{Actor, Ref}, Behind}) ->
            ?assertEqual(ok, answer(Actor, Ref)),
            ?assertEqual(Behind, waiting()),
            ?assertEqual(1, ?WRITER:current()),
            ok = ask(Actor, fun() -> ?WRITER:release() end)
        end,
        [{Head, [Pid || {Pid, _} <- lists:nthtail(N, Line)]}
         || {N, Head} <- lists:zip(lists:seq(1, 5), Line)]
    ),
    ?assertEqual(0, ?WRITER:current()).

a_higher_limit_is_handed_out_at_once(_Config) ->
    ok = ?WRITER:set_max_concurrent(1),
    ok = ?WRITER:acquire(0),
    [First, Second, {Third, _}] = [wait_in_line() || _ <- [1, 2, 3]],
    ?assertEqual(ok, ?WRITER:set_max_concurrent(3)),
    ?assertEqual({3, 3}, {?WRITER:max_concurrent(), ?WRITER:current()}),
    ?assertEqual([Third], waiting()),
    [?assertEqual(ok, answer(Actor, Ref)) || {Actor, Ref} <- [First, Second]],
    [kill(Actor) || Actor <- [Third | [Pid || {Pid, _} <- [First, Second]]]],
    ok = ?WRITER:release(),
    eventually(fun() -> ?WRITER:current() =:= 0 end).

a_lower_limit_takes_nothing_away(_Config) ->
    [ok = ?WRITER:acquire(0) || _ <- [1, 2, 3]],
    ?assertEqual(ok, ?WRITER:set_max_concurrent(1)),
    ?assertEqual({1, 3}, {?WRITER:max_concurrent(), ?WRITER:current()}),
    {Actor, Ref} = wait_in_line(),
    %% A release hands a slot over before it returns, if it does.
    [
        begin
            ok = ?WRITER:release(),
            ?assertEqual({N, [Actor]}, {?WRITER:current(), waiting()})
        end
     || N <- [2, 1]
    ],
    ok = ?WRITER:release(),
    ?assertEqual(ok, answer(Actor, Ref)),
    ?assertEqual({1, []}, {?WRITER:current(), waiting()}),
    ok = ask(Actor, fun() -> ?WRITER:release() end).

%% The waiter is held up while its time runs out, and gets the slot before it can give up.
a_slot_that_comes_with_the_timeout_is_taken(_Config) ->
    ok = ?WRITER:set_max_concurrent(1),
    [slot_comes_with_the_timeout(50) || _ <- [1, 2, 3]],
    ?assertEqual({0, []}, {?WRITER:current(), waiting()}).

slot_comes_with_the_timeout(Ms) ->
    ok = ?WRITER:acquire(0),
    Waiter = actor(),
    Waiting = tell(Waiter, fun() ->
        Result = ?WRITER:acquire(Ms),
        {Result, own_messages()}
    end),
    eventually(fun() -> waiting() =/= [] orelse answered(Waiting) end),
    true = erlang:suspend_process(Waiter),
    %% Its timer was set before this one.
    Timer = erlang:start_timer(2 * Ms, self(), over),
    receive {timeout, Timer, over} -> ok end,
    InTime = waiting() =:= [Waiter],
    ok = ?WRITER:release(),
    true = erlang:resume_process(Waiter),
    case answer(Waiter, Waiting) of
        {ok, []} ->
            ok = ask(Waiter, fun() -> ?WRITER:release() end);
        {{error, max_concurrent}, []} when not InTime ->
            %% It had given up before it could be held up.
            slot_comes_with_the_timeout(2 * Ms)
    end.

answered(Ref) ->
    lists:keymember(Ref, 1, own_messages()).

%% Timeouts that race with slots that are handed over: each ends in one of the two, and neither in
%% a message that nobody reads.
no_message_is_left_behind(_Config) ->
    ok = ?WRITER:set_max_concurrent(1),
    Turns = fun() ->
        [
            case ?WRITER:acquire(N rem 3) of
                ok -> ok = ?WRITER:release();
                {error, max_concurrent} -> ok
            end
         || N <- lists:seq(1, 500)
        ],
        own_messages()
    end,
    Running = [{Actor, tell(Actor, Turns)} || Actor <- [actor() || _ <- lists:seq(1, 8)]],
    [?assertEqual([], answer(Actor, Ref)) || {Actor, Ref} <- Running],
    ?assertEqual({0, []}, {?WRITER:current(), waiting()}).

a_process_keeps_two_entries_and_no_message(_Config) ->
    Life = fun() ->
        [ok = ?WRITER:acquire(N) || N <- [0, 1, infinity]],
        {error, max_concurrent} = ?WRITER:acquire(1),
        [ok = ?WRITER:release() || _ <- [1, 2, 3, 4]],
        {ok, _} = save(),
        {error, already_present} = save(),
        {error, {missing_key, tokens}} = save(maps:remove(tokens, meta())),
        {length(get()), own_messages()}
    end,
    {Entries, Messages} = ask(actor(), Life),
    %% One for its slots, one for the turns of its I/O.
    ?assert(Entries =< 2),
    ?assertEqual([], Messages).

bad_arguments_match_no_clause(_Config) ->
    NoClause = fun(Function, Args) ->
        ?assertError(function_clause, apply(?WRITER, Function, Args))
    end,
    BadTimeouts = [-1, 1.0, soon, "5", undefined],
    [NoClause(acquire, [Bad]) || Bad <- BadTimeouts],
    [NoClause(set_max_concurrent, [Bad]) || Bad <- [0, -1, 1.0, many, infinity, "3"]],
    [NoClause(save, [?TIER, disk, meta(), ?PAYLOAD, Bad]) || Bad <- BadTimeouts],
    [NoClause(save, [?TIER, Bad, meta(), ?PAYLOAD, 0]) || Bad <- [ram, "disk", <<"disk">>, 1]],
    [NoClause(save, [Bad, disk, meta(), ?PAYLOAD, 0]) || Bad <- ["tier", self(), 1]],
    [NoClause(save, [?TIER, disk, Bad, ?PAYLOAD, 0]) || Bad <- [[], undefined, {meta}]],
    [NoClause(save, [?TIER, disk, meta(), Bad, 0]) || Bad <- ["text", <<1:7>>, undefined, [<<>>]]],
    %% With the timeout left out it is the same.
    ?assertError(function_clause, ?WRITER:save(?TIER, ram, meta(), ?PAYLOAD)),
    ?assertEqual([], erllama_fake:calls()),
    ?assertEqual({0, ?LIMIT}, {?WRITER:current(), ?WRITER:max_concurrent()}).

%%% Owners that end

owner_ends_in_any_way(_Config) ->
    Ends = [
        fun() -> ok end,
        fun() -> exit(shutdown) end,
        fun() -> exit(crashed) end,
        fun() -> exit(self(), kill) end,
        fun() -> throw(uncaught) end
    ],
    [
        begin
            {Owner, Monitor} = spawn_monitor(fun() ->
                [ok = ?WRITER:acquire(0) || _ <- [1, 2, 3]],
                End()
            end),
            receive {'DOWN', Monitor, process, Owner, _} -> ok end,
            eventually(fun() -> ?WRITER:current() =:= 0 end)
        end
     || End <- Ends
    ].

owner_dies_waiting(_Config) ->
    ok = ?WRITER:set_max_concurrent(1),
    ok = ?WRITER:acquire(0),
    [{First, _}, {Second, Ref}] = [wait_in_line(), wait_in_line()],
    kill(First),
    eventually(fun() -> waiting() =:= [Second] end),
    ok = ?WRITER:release(),
    ?assertEqual(ok, answer(Second, Ref)),
    kill(Second),
    eventually(fun() -> ?WRITER:current() =:= 0 end).
