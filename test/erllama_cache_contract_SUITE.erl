%% The writer as the application erllama knows it: its exports, what it asks of the host's modules
%% and in which order, and what is left behind by all that can go wrong. The host's modules are
%% fakes, see erllama_fake.
-module(erllama_cache_contract_SUITE).
-behaviour(supervisor).

-include_lib("common_test/include/ct.hrl").
-include_lib("kernel/include/file.hrl").
-include_lib("stdlib/include/assert.hrl").

-compile(export_all).

-import(erllama_cache_test_util, [
    in_project/1, fresh_dir/2, files/1, open_files/1, file_of/2, meta/0, meta/1, eventually/1,
    actor/0, actor/1, ask/2, tell/2, answer/2, kill/1, own_messages/0, run_command/2
]).
-import(erllama_cache_hooked_host, [hold_turns/0, next_turn/1, go_on/1, waits_for_a_turn/1]).

-define(WRITER, erllama_cache_writer).
-define(META_SRV, erllama_cache_meta_srv).
-define(DISK_SRV, erllama_cache_disk_srv).
-define(TIER, contract_tier).
-define(LIMIT, 3).
-define(PAYLOAD, <<"a payload">>).
-define(DUPLICATE_DROPPED, 16).
%% Milliseconds.
-define(LEASE, 60000).

suite() ->
    [{timetrap, {seconds, 60}}].

all() ->
    [{group, Group} || {Group, _, _} <- groups()].

groups() ->
    [
        {server, [], [
            start_link_takes_the_limit_from_the_environment,
            start_link_refuses_what_is_no_limit,
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
            slots_are_the_calling_processs,
            acquire_gives_up_in_time,
            waiters_are_served_in_order,
            a_higher_limit_is_handed_out_at_once,
            a_lower_limit_takes_nothing_away,
            a_slot_that_comes_with_the_timeout_is_taken,
            no_message_is_left_behind,
            a_process_keeps_two_entries_and_no_message,
            bad_arguments_match_no_clause
        ]},
        {save, [], [
            save_calls_the_host_in_order,
            save_waits_for_a_slot,
            save_without_a_slot_does_nothing,
            save_counts_its_reason,
            save_of_a_stored_key,
            save_of_a_reserved_key,
            save_names_both_tiers,
            file_has_its_name_and_mode,
            key_and_quant_byte_are_the_hosts,
            files_are_as_the_oracle_builds_them,
            later_save_takes_its_own_key
        ]},
        {failures, [], [
            tier_server_is_not_there,
            tier_server_is_busy,
            root_is_missing,
            root_is_a_file,
            root_takes_no_files,
            root_is_read_only,
            disk_is_full,
            descriptors_run_out,
            root_vanishes_before_publishing,
            reservation_expires_while_writing,
            reservation_expires_before_mark_published,
            reservation_expires_before_announce_saved,
            host_raises
        ]},
        {leases, [], [
            second_saver_meets_a_conflict,
            key_of_a_dead_saver_is_free_at_once,
            time_in_the_queue_is_no_time_of_a_lease,
            lease_is_renewed_while_it_writes,
            lease_is_renewed_while_it_waits_for_its_turn,
            key_lost_while_it_waits_for_its_turn,
            regranted_before_publishing,
            regranted_after_publishing,
            regranted_before_announcing,
            turn_that_follows_waits_for_the_announcement,
            failure_answers_nobody_who_waits
        ]},
        {taken_name, [], [
            valid_file_is_adopted,
            rewritten_hit_count_is_adopted,
            name_taken_while_writing,
            damaged_file_is_replaced,
            file_of_another_key_is_replaced,
            fifo_is_replaced,
            link_is_replaced_and_its_target_stays,
            directory_is_an_error
        ]},
        {input, [], [
            missing_keys,
            invalid_values,
            extreme_values,
            quant_type_of_no_table,
            defaults
        ]},
        {roots, [], [
            root_as_string_and_binary,
            root_with_a_nul,
            roots_beyond_ascii
        ]},
        {deaths, [], [
            owner_dies_in_a_call_to_the_host,
            owner_dies_in_a_long_write,
            owner_ends_in_any_way,
            owner_dies_waiting
        ]}
    ].

init_per_suite(Config) ->
    %% Without it nobody would judge what is saved.
    os:find_executable("python3") =/= false orelse
        ct:fail("python3 is missing: tools/setup.sh installs it"),
    {ok, Started} = application:ensure_all_started(crypto),
    [{started, Started} | Config].

end_per_suite(Config) ->
    lists:foreach(fun application:stop/1, ?config(started, Config)).

init_per_testcase(Case, Config) ->
    Root = fresh_dir(Case, Config),
    ok = erllama_fake:start(?TIER, Root),
    start_writer(?LIMIT),
    eventually(fun() -> ?WRITER:current() =:= 0 end),
    [{root, Root} | Config].

%% Whatever a test leaves in the root under a name that ends in .kvc is a file that the host takes.
%% A test that leaves another one there on purpose says so, and removes it.
end_per_testcase(_Case, Config) ->
    Root = ?config(root, Config),
    stop_writer(),
    Verdict = the_host_takes(lists:sort(filelib:wildcard(Root ++ "/**/*.kvc"))),
    ok = erllama_fake:stop(),
    unmount(Root),
    Verdict.

start_writer(Config) ->
    {ok, Pid} = ?WRITER:start_link(Config),
    true = unlink(Pid),
    Pid.

stop_writer() ->
    case whereis(?WRITER) of
        undefined -> ok;
        _ -> gen_server:stop(?WRITER)
    end.

restart_writer(Config) ->
    stop_writer(),
    start_writer(Config).

%%% The server

start_link_takes_the_limit_from_the_environment(_Config) ->
    Default = erlang:system_info(schedulers) * 2 + 1,
    LimitFrom = fun(Value) ->
        ok = application:set_env(erllama, writer_max_concurrent, Value),
        stop_writer(),
        {ok, Pid} = ?WRITER:start_link(),
        true = unlink(Pid),
        ?WRITER:max_concurrent()
    end,
    try
        ?assertEqual(7, LimitFrom(7)),
        [?assertEqual(Default, LimitFrom(Bad)) || Bad <- [0, -1, 2.0, many, undefined]],
        ok = application:unset_env(erllama, writer_max_concurrent),
        stop_writer(),
        {ok, Pid} = ?WRITER:start_link(),
        true = unlink(Pid),
        ?assertEqual(Default, ?WRITER:max_concurrent())
    after
        application:unset_env(erllama, writer_max_concurrent)
    end.

start_link_refuses_what_is_no_limit(_Config) ->
    stop_writer(),
    [
        ?assertError(function_clause, ?WRITER:start_link(Bad))
     || Bad <- [0, -1, 1.0, many, "3", <<3>>, infinity]
    ],
    ?assertEqual(undefined, whereis(?WRITER)).

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
    stop_writer(),
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
    stop_writer(),
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
    stop_writer(),
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

slots_are_the_calling_processs(_Config) ->
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

%%% Saving

save_calls_the_host_in_order(Config) ->
    Root = ?config(root, Config),
    Self = self(),
    Payload = crypto:strong_rand_bytes(100000),
    Look = fun(Name) ->
        {before, fun(_Args) -> Self ! {Name, ?WRITER:current(), files(Root), open_files(Root)} end}
    end,
    [ok = erllama_fake:script(Name, [Look(Name)]) || Name <- host_calls()],
    {ok, Key} = ?WRITER:save(?TIER, disk, meta(), Payload),
    ?assertEqual(0, ?WRITER:current()),

    #{fingerprint := Fingerprint, quant_type := QuantType, ctx_params_hash := CtxParamsHash,
      tokens := Tokens} = meta(),
    TokensBin = <<<<Token:32/little>> || Token <- Tokens>>,
    ?assertEqual(crypto:hash(sha256, [Fingerprint, 7, CtxParamsHash, TokensBin]), Key),
    Path = file_of(Root, Key),
    {ok, <<Header:48/binary, _/binary>> = File} = file:read_file(Path),
    Size = byte_size(File),
    ?assertEqual(Payload, payload(File)),

    %% Every call comes from here, and the key is known before anything is reserved.
    ?assertEqual([Self], lists:usort([Caller || {_, _, Caller} <- erllama_fake:calls()])),
    {AboutTheKey, Others} = lists:splitwith(
        fun(Name) -> lists:member(Name, [make, quant_byte, encode_tokens]) end, calls()
    ),
    ?assertEqual([true, true], [lists:member(Name, AboutTheKey) || Name <- [make, quant_byte]]),
    ?assertEqual([[QuantType]], args(quant_byte)),
    ?assertEqual(
        [reserve_save, dir, check_reservation, mark_published, announce_saved, incr], Others
    ),
    ?assertEqual([[Key, disk, Self]], args(reserve_save)),
    ?assertEqual([[?TIER]], args(dir)),
    [[Key, Token]] = args(check_reservation),
    ?assert(is_reference(Token)),
    ?assertEqual([[Key, Token, Path]], args(mark_published)),
    ?assertEqual([[Key, Token, Size, Header, TokensBin]], args(announce_saved)),
    ?assertEqual([[4]], args(incr)),
    ?assertEqual({[], [Key]}, {?META_SRV:reserved(), ?META_SRV:stored()}),

    %% The slot is held all the time. There is a file when it has been checked that the key is
    %% still ours, it shows when it is published, and nothing stays open.
    Name = filename:basename(Path),
    [
        receive
            {Call, Held, Files, Open} ->
                ?assertEqual({Call, 1}, {Call, Held}),
                Published = lists:member(Call, [mark_published, announce_saved, incr]),
                ?assertEqual({Call, [Name || Published]}, {Call, Files}),
                Writing = Call =:= check_reservation andalso filelib:is_dir("/proc/self/fd"),
                ?assertEqual({Call, Writing}, {Call, Open =/= []})
        after 0 -> error({not_called, Call})
        end
     || Call <- calls()
    ],
    ok = nothing_open(Root).

save_waits_for_a_slot(_Config) ->
    ok = ?WRITER:set_max_concurrent(1),
    ok = ?WRITER:acquire(0),
    Actor = actor(),
    Saving = tell(Actor, fun() -> save() end),
    eventually(fun() -> waiting() =:= [Actor] end),
    ?assertEqual([], erllama_fake:calls()),
    ok = ?WRITER:release(),
    ?assertMatch({ok, _}, answer(Actor, Saving)),
    ?assertEqual(0, ?WRITER:current()).

save_without_a_slot_does_nothing(Config) ->
    ok = ?WRITER:set_max_concurrent(1),
    ok = ?WRITER:acquire(0),
    Actor = actor(),
    [
        ?assertEqual(
            {error, max_concurrent},
            ask(Actor, fun() -> ?WRITER:save(?TIER, disk, meta(), ?PAYLOAD, Ms) end)
        )
     || Ms <- [0, 10]
    ],
    ?assertEqual([], erllama_fake:calls()),
    ?assertEqual(#{}, erllama_cache_counters:all()),
    ok = ?WRITER:release(),
    assert_nothing_left(Config).

save_counts_its_reason(_Config) ->
    Counters = [
        {cold, #{4 => 1}},
        {continued, #{5 => 1}},
        {finish, #{6 => 1}},
        {evict, #{7 => 1}},
        {shutdown, #{8 => 1}},
        {unknown, #{}}
    ],
    [
        begin
            ok = erllama_cache_counters:reset(),
            {ok, _} = save((meta([N]))#{save_reason := Reason}),
            ?assertEqual({Reason, Counted}, {Reason, erllama_cache_counters:all()})
        end
     || {N, {Reason, Counted}} <- lists:zip(lists:seq(1, length(Counters)), Counters)
    ].

save_of_a_stored_key(Config) ->
    {ok, Key} = save(),
    ok = erllama_fake:forget_calls(),
    ok = erllama_cache_counters:reset(),
    ?assertEqual({error, already_present}, save(meta(), <<"another">>)),
    ?assertEqual(#{?DUPLICATE_DROPPED => 1}, erllama_cache_counters:all()),
    ?assertEqual([reserve_save, incr], calls_after_the_key()),
    ?assertEqual({?PAYLOAD, 0}, {stored_payload(Config, Key), ?WRITER:current()}).

save_of_a_reserved_key(Config) ->
    {ok, Key} = save(),
    ok = ?META_SRV:forget(Key),
    ok = file:delete(file_of(?config(root, Config), Key)),
    Actor = actor(),
    {ok, Token} = ask(Actor, fun() -> ?META_SRV:reserve_save(Key, disk, self()) end),
    ok = erllama_fake:forget_calls(),
    ok = erllama_cache_counters:reset(),
    ?assertEqual({error, conflict}, save()),
    ?assertEqual([reserve_save], calls_after_the_key()),
    ?assertEqual(#{}, erllama_cache_counters:all()),
    ?assertEqual([{Key, Token}], ?META_SRV:reserved()),
    ok = ?META_SRV:cancel_reservation(Key, Token),
    assert_nothing_left(Config).

save_names_both_tiers(_Config) ->
    {ok, OnDisk} = ?WRITER:save(?TIER, disk, meta([1]), ?PAYLOAD, 0),
    {ok, InRam} = ?WRITER:save(?TIER, ram_file, meta([2]), ?PAYLOAD, infinity),
    ?assertEqual([[OnDisk, disk, self()], [InRam, ram_file, self()]], args(reserve_save)).

file_has_its_name_and_mode(Config) ->
    Root = ?config(root, Config),
    {ok, Private} = save(meta([1])),
    _ = restart_writer(#{max_concurrent => 1, file_mode => 8#664}),
    {ok, Shared} = save(meta([2])),
    Expected = [
        {<<(string:lowercase(binary:encode_hex(Key)))/binary, ".kvc">>, Mode}
     || {Key, Mode} <- [{Private, 8#100600}, {Shared, 8#100664}]
    ],
    ?assertEqual(lists:sort([binary_to_list(Name) || {Name, _} <- Expected]), files(Root)),
    [
        begin
            {ok, #file_info{mode = Actual}} = file:read_file_info(filename:join(Root, Name)),
            ?assertEqual(Mode, Actual)
        end
     || {Name, Mode} <- Expected
    ].

%% A host whose table has grown must find what is saved.
key_and_quant_byte_are_the_hosts(Config) ->
    ok = erllama_cache_key:grow(a_later_quant, 77),
    Meta = #{fingerprint := Fingerprint, ctx_params_hash := CtxParamsHash, tokens := Tokens} =
        (meta())#{quant_type := a_later_quant},
    TokensBin = <<<<Token:32/little>> || Token <- Tokens>>,
    {ok, Theirs} = save(Meta),
    ?assertEqual(crypto:hash(sha256, [Fingerprint, 77, CtxParamsHash, TokensBin]), Theirs),
    ?assertEqual(77, stored_quant_byte(Config, Theirs)),
    ?assertMatch({ok, #{key := Theirs}, ?PAYLOAD}, ?DISK_SRV:load(?TIER, Theirs)),
    {ok, Ours} = save(),
    ?assertNotEqual(Theirs, Ours),
    ?assertEqual(7, stored_quant_byte(Config, Ours)),
    %% Left on purpose, and for this host only: the oracle's table has not grown.
    File = file_of(?config(root, Config), Theirs),
    ?assertMatch({0, _}, oracle(["check", File])),
    ?assertMatch({1, _}, oracle(["check", "--host", File])),
    ok = file:delete(File).

%% Byte for byte, but for the digest, which the oracle checks and does not build.
files_are_as_the_oracle_builds_them(Config) ->
    _ = restart_writer(#{max_concurrent => ?LIMIT, digest => none}),
    [built_alike(Meta, Payload, Config) || {Meta, Payload} <- varied()].

built_alike(Meta, Payload, Config) ->
    Root = ?config(root, Config),
    {ok, Key} = save(Meta, Payload),
    {ok, File} = file:read_file(file_of(Root, Key)),
    [Json, Raw, Built] = [filename:join(Root, Name) || Name <- ["json", "raw", "built"]],
    ok = file:write_file(Json, json(Meta)),
    ok = file:write_file(Raw, Payload),
    ?assertEqual({0, ""}, oracle(["build", Json, Raw, Built])),
    {ok, Expected} = file:read_file(Built),
    ?assertEqual(byte_size(Expected), byte_size(File)),
    ?assert(Expected =:= File).

varied() ->
    Complete = #{creation_time => 1700000000, last_used_time => 1700000001, hostname => <<"host">>,
                 erllama_version => <<"1.2.3">>},
    Extreme = Complete#{creation_time := 16#ffffffffffffffff, last_used_time := 0,
                        hit_count => 16#ffffffff, context_size => 16#ffffffff, quant_bits => 255},
    [
        {maps:merge(meta(), Complete), <<>>},
        {maps:merge(meta([]), Extreme), <<0>>},
        {maps:merge(meta([-1, 1 bsl 32, 1 bsl 70 + 9, -(1 bsl 63)]), Complete), ?PAYLOAD},
        {
            maps:merge(meta(lists:seq(0, 5000)), Complete#{
                prompt_text => <<"Wie heißt es? 何"/utf8>>,
                save_reason => finish,
                save_reason_detail => <<"end of turn">>,
                fingerprint_mode => gguf_chunked,
                quant_type => iq2_xxs
            }),
            crypto:strong_rand_bytes(70000)
        },
        {
            maps:merge(meta([7]), Complete#{
                hostname := <<>>, erllama_version := <<>>, save_reason => unknown,
                fingerprint_mode => fast_unsafe, quant_type => bf16, quant_bits => 0
            }),
            %% Large enough to be written in pieces.
            crypto:strong_rand_bytes(2500000)
        }
    ].

%% One process's saves have nothing to do with each other.
later_save_takes_its_own_key(Config) ->
    {ok, First} = save(meta([1]), <<"first">>),
    {ok, Second} = save(meta([2]), <<"second">>),
    ?assertEqual(
        {<<"first">>, <<"second">>}, {stored_payload(Config, First), stored_payload(Config, Second)}
    ),
    ?assertEqual(lists:sort([First, Second]), lists:sort(?META_SRV:stored())).

%%% What can fail

tier_server_is_not_there(Config) ->
    ok = gen_server:stop(?TIER),
    ?assertExit({noproc, {gen_server, call, [?TIER, dir]}}, save()),
    ?assertEqual([reserve_save, dir, cancel_reservation], calls_but_the_check()),
    assert_nothing_left(Config).

%% It is reading what others load. The call's 5 s are over at once here.
tier_server_is_busy(Config) ->
    ok = erllama_fake:script(dir, [
        {instead, fun([TierSrv]) -> gen_server:call(TierSrv, dir, 0) end}
    ]),
    ok = sys:suspend(?TIER),
    ?assertEqual({{error, tier_busy}, []}, ask(actor(), fun() -> {save(), own_messages()} end)),
    ok = sys:resume(?TIER),
    ?assertEqual([reserve_save, dir, cancel_reservation], calls_but_the_check()),
    assert_nothing_left(Config),
    ?assertMatch({ok, _}, save()).

root_is_missing(Config) ->
    Missing = filename:join(?config(root, Config), "missing"),
    fails_and_is_undone({error, enoent}, Missing, ?PAYLOAD, Config),
    ?assertEqual([], files(?config(root, Config))).

root_is_a_file(Config) ->
    Root = ?config(root, Config),
    File = filename:join(Root, "file"),
    ok = file:write_file(File, <<"not a directory">>),
    fails_and_is_undone({error, enotdir}, File, ?PAYLOAD, Config),
    ?assertEqual(["file"], files(Root)),
    ?assertEqual({ok, <<"not a directory">>}, file:read_file(File)),
    ok = file:delete(File).

%% A directory in which not even root can create files.
root_takes_no_files(Config) ->
    case filelib:is_dir("/proc/self/fd") of
        true ->
            ok = erllama_fake:script(dir, [{return, "/proc"}]),
            ?assertMatch({error, Reason} when is_atom(Reason), save()),
            ?assertEqual([reserve_save, dir, cancel_reservation], calls_but_the_check()),
            assert_nothing_left(Config);
        false ->
            {skip, "no /proc"}
    end.

root_is_read_only(Config) ->
    Root = ?config(root, Config),
    case mount_tmpfs(Root, "ro") of
        ok -> fails_and_is_undone({error, erofs}, Root, ?PAYLOAD, Config);
        Skip -> Skip
    end.

%% Small and large files ask for their space in different ways; neither may keep it.
disk_is_full(Config) ->
    Root = ?config(root, Config),
    case mount_tmpfs(Root, "size=512k") of
        ok ->
            fails_and_is_undone({error, enospc}, Root, <<0:(800 * 1024 * 8)>>, Config),
            fails_and_is_undone({error, enospc}, Root, <<0:(3 * 1024 * 1024 * 8)>>, Config),
            {ok, Key} = save(meta(), <<0:(400 * 1024 * 8)>>),
            ?assertEqual([filename:basename(file_of(Root, Key))], files(Root));
        Skip ->
            Skip
    end.

descriptors_run_out(Config) ->
    Root = ?config(root, Config),
    %% On a node with few of them.
    Shell = ["/bin/sh", "-c", "ulimit -n 256 && exec \"$0\" \"$@\"", os:find_executable("erl")],
    Name = on_peer(Shell, fun() -> save_without_descriptors(Root) end),
    ?assertEqual([Name], files(Root)).

save_without_descriptors(Root) ->
    ok = erllama_fake:start(?TIER, Root),
    _ = start_writer(1),
    %% Whatever a first save loads or opens for good is there afterwards.
    {ok, First} = save(meta([1])),
    ok = file:delete(file_of(Root, First)),
    Descriptors = use_up_descriptors([]),
    ok = erllama_fake:forget_calls(),
    ?assertEqual({error, emfile}, save()),
    ?assertEqual([reserve_save, dir, cancel_reservation], calls_but_the_check()),
    ?assertEqual({0, []}, {?WRITER:current(), ?META_SRV:reserved()}),
    %% One is enough for the root, not for the file in it.
    ok = file:close(hd(Descriptors)),
    ?assertEqual({error, emfile}, save()),
    ok = lists:foreach(fun file:close/1, tl(Descriptors)),
    ?assertEqual([], files(Root)),
    {ok, Key} = save(),
    filename:basename(file_of(Root, Key)).

use_up_descriptors(Sofar) ->
    case file:open("/dev/null", [read, raw]) of
        {ok, Descriptor} -> use_up_descriptors([Descriptor | Sofar]);
        {error, emfile} -> Sofar
    end.

root_vanishes_before_publishing(Config) ->
    Root = fresh_dir("vanishing", Config),
    ok = erllama_fake:script(dir, [{return, Root}]),
    ok = erllama_fake:script(check_reservation, [
        {before, fun(_) -> ok = file:del_dir(Root) end}
    ]),
    ?assertEqual({error, enoent}, save()),
    ?assertEqual(
        [reserve_save, dir, check_reservation, cancel_reservation], calls_after_the_key()
    ),
    ok = nothing_open(Root),
    assert_nothing_left(Config).

%% The key is somebody else's by now, and so is the reservation.
reservation_expires_while_writing(Config) ->
    Self = self(),
    Other = actor(),
    ok = erllama_fake:script(check_reservation, [
        {before, fun([Key, _Token]) ->
            ok = ?META_SRV:expire(Key),
            {ok, _} = ask(Other, fun() -> ?META_SRV:reserve_save(Key, disk, self()) end),
            Self ! {key, Key}
        end}
    ]),
    Root = ?config(root, Config),
    ?assertEqual(
        {{error, expired}, []}, ask(untidy_actor(), fun() -> {save(), open_files(Root)} end)
    ),
    Key = receive {key, K} -> K after 0 -> error(not_checked) end,
    ?assertEqual(
        [reserve_save, dir, check_reservation, reserve_save], calls_after_the_key()
    ),
    ?assertMatch([{Key, _}], ?META_SRV:reserved()),
    [{Key, Theirs}] = ?META_SRV:reserved(),
    ok = ?META_SRV:cancel_reservation(Key, Theirs),
    assert_nothing_left(Config).

reservation_expires_before_mark_published(Config) ->
    expires_after_publishing(mark_published, [mark_published], Config).

reservation_expires_before_announce_saved(Config) ->
    expires_after_publishing(announce_saved, [mark_published, announce_saved], Config).

%% The file stays, for the host to find it, but it is no success.
expires_after_publishing(Call, Calls, Config) ->
    ok = erllama_fake:script(Call, [{before, fun([Key | _]) -> ok = ?META_SRV:expire(Key) end}]),
    ?assertEqual({error, expired}, save()),
    ?assertEqual([reserve_save, dir, check_reservation | Calls], calls_after_the_key()),
    ?assertEqual(#{}, erllama_cache_counters:all()),
    Root = ?config(root, Config),
    [[Key, _, Path]] = args(mark_published),
    ?assertEqual([filename:basename(Path)], files(Root)),
    ?assertEqual(?PAYLOAD, stored_payload(Config, Key)),
    ok = nothing_open(Root),
    ?assertEqual(0, ?WRITER:current()).

%% Whatever a call raises is raised to the caller, and leaves nothing behind.
host_raises(Config) ->
    [
        raises(Call, Class, Config)
     || Call <- host_calls() ++ [cancel_reservation], Class <- [error, exit, throw]
    ].

raises(Call, Class, Config) ->
    Root = ?config(root, Config),
    Reason = {raised_by, Call},
    ok = erllama_fake:forget_calls(),
    ok = erllama_fake:script(Call, [{raise, Class, Reason}]),
    %% Only a save that fails cancels anything.
    [ok = script_failure() || Call =:= cancel_reservation],
    Actor = untidy_actor(),
    ?assertException(Class, Reason, ask(Actor, fun() -> save() end)),
    ?assertEqual({Call, Class, 0}, {Call, Class, ?WRITER:current()}),
    ?assertEqual({Call, Class, []}, {Call, Class, open_files(Root)}),
    Published = lists:member(Call, [mark_published, announce_saved, incr]),
    ?assertEqual({Call, Class, Published}, {Call, Class, files(Root) =/= []}),
    Cancels = lists:member(Call, [dir, check_reservation, cancel_reservation]),
    ?assertEqual({Call, Class, Cancels}, {Call, Class, lists:member(cancel_reservation, calls())}),
    Kept = lists:member(Call, [mark_published, announce_saved, cancel_reservation]),
    ?assertEqual({Call, Class, Kept}, {Call, Class, ?META_SRV:reserved() =/= []}),
    kill(Actor),
    eventually(fun() -> ?META_SRV:reserved() =:= [] end),
    %% The same save goes well now: it adopts its own file where there is one.
    [ok = ?META_SRV:forget(Key) || Key <- ?META_SRV:stored()],
    ?assertMatch({ok, _}, save()),
    [ok = ?META_SRV:forget(Key) || Key <- ?META_SRV:stored()],
    [ok = file:delete(filename:join(Root, File)) || File <- files(Root)].

%%% Leases

%% Two save one key at the same time.
second_saver_meets_a_conflict(Config) ->
    Second = actor(),
    Self = self(),
    ok = erllama_fake:script(check_reservation, [
        {before, fun(_Args) -> Self ! {second, ask(Second, fun() -> save() end)} end}
    ]),
    {ok, Key} = save(),
    ?assertEqual({error, conflict}, receive {second, Result} -> Result after 0 -> none end),
    ?assertEqual({error, already_present}, ask(Second, fun() -> save() end)),
    ?assertEqual(#{4 => 1, ?DUPLICATE_DROPPED => 1}, erllama_cache_counters:all()),
    assert_only(file_of(?config(root, Config), Key), Config).

%% The host may not have been told of the death yet.
key_of_a_dead_saver_is_free_at_once(Config) ->
    Self = self(),
    Block = {before, fun(_Args) -> Self ! blocked, receive never -> ok end end},
    ok = erllama_fake:script(check_reservation, [Block]),
    First = actor(),
    _ = tell(First, fun() -> save(meta(), <<"the dead one's">>) end),
    receive blocked -> ok end,
    ok = sys:suspend(?META_SRV),
    kill(First),
    Second = actor(),
    Saving = tell(Second, fun() -> save() end),
    ok = sys:resume(?META_SRV),
    {ok, Key} = answer(Second, Saving),
    ?assertEqual(?PAYLOAD, stored_payload(Config, Key)),
    assert_only(file_of(?config(root, Config), Key), Config).

%% Nothing is reserved before there is a slot, so that no lease can run out in the queue.
time_in_the_queue_is_no_time_of_a_lease(_Config) ->
    ok = ?WRITER:set_max_concurrent(1),
    ok = ?WRITER:acquire(0),
    Actor = actor(),
    Saving = tell(Actor, fun() -> save() end),
    eventually(fun() -> waiting() =:= [Actor] end),
    ok = ?META_SRV:advance(10 * ?LEASE),
    ?assertEqual([], ?META_SRV:reserved()),
    ok = ?WRITER:release(),
    ?assertMatch({ok, _}, answer(Actor, Saving)).

%% A save asks between its slices, if its last question was long enough ago: here that is at once.
%% So it does between those in which it checks a file that has its name already.
lease_is_renewed_while_it_writes(Config) ->
    Root = ?config(root, Config),
    on_peer(["erl"], fun() ->
        ok = on_a_fresh_node(Root, 0),
        save_in_many_slices(Root, 64 * 1024 * 1024)
    end).

save_in_many_slices(Root, Bytes) ->
    {Key, Writing} = late_questions(<<0:Bytes/unit:8>>),
    ok = ?META_SRV:forget(Key),
    {Key, Checking} = late_questions(<<0:(100000 * 8)>>),
    %% It would take the oracle minutes.
    ?assertMatch({ok, #{size := Size}, _} when Size > Bytes,
                 erllama_fake_kvc:look(file_of(Root, Key))),
    ok = file:delete(file_of(Root, Key)),
    ok = ?META_SRV:forget(Key),
    %% Each asks once more, before it publishes.
    case Writing > 2 andalso Checking > 1 of
        true -> ok;
        %% It takes one slice only, on a machine that is fast.
        false when Bytes < 1 bsl 29 -> save_in_many_slices(Root, 2 * Bytes)
    end.

%% How often a save asks when each question comes late, but in time.
late_questions(Payload) ->
    ok = erllama_fake:forget_calls(),
    Late = {before, fun(_Args) -> ok = ?META_SRV:advance(?LEASE - 20000) end},
    ok = erllama_fake:script(check_reservation, lists:duplicate(1000, Late)),
    {ok, Key} = save(meta(), Payload),
    {Key, length(args(check_reservation))}.

%% As long as others have all the turns on the dirty schedulers, whose disk is slow.
lease_is_renewed_while_it_waits_for_its_turn(Config) ->
    Root = ?config(root, Config),
    on_peer(["erl"], fun() -> save_waits_for_turns(Root) end).

save_waits_for_turns(Root) ->
    ok = on_a_fresh_node(Root, 1),
    [
        begin
            Saver = actor(),
            Turns = hold_turns(),
            Saving = tell(Saver, fun() -> save(meta([byte_size(Payload)]), Payload) end),
            %% The last of these waits is for its publication, if it is not a small save.
            After = lists:foldl(
                fun(_Nth, Held) ->
                    ok = waits_for_a_turn(Saver),
                    [ok = time_passes_and_it_asks() || _ <- [1, 2, 3]],
                    next_turn(Held)
                end,
                Turns,
                lists:seq(1, Waits)
            ),
            ?assertMatch({ok, _}, answer(Saver, Saving)),
            ok = go_on(After)
        end
     || {Payload, Waits} <- [{?PAYLOAD, 1}, {<<0:(100000 * 8)>>, 2}]
    ],
    ok.

time_passes_and_it_asks() ->
    ok = ?META_SRV:advance(?LEASE - 20000),
    Asked = length(args(check_reservation)),
    eventually(fun() -> length(args(check_reservation)) > Asked end).

%% Nothing is published without the reservation, however late the turn comes.
key_lost_while_it_waits_for_its_turn(Config) ->
    Root = ?config(root, Config),
    on_peer(["erl"], fun() -> save_loses_its_key_in_line(Root) end).

save_loses_its_key_in_line(Root) ->
    ok = on_a_fresh_node(Root, 1),
    [
        begin
            [Saver, Other] = [untidy_actor(), actor()],
            Turns = hold_turns(),
            Saving = tell(Saver, fun() -> {save(meta(), Payload), open_files(Root)} end),
            Held = lists:foldl(
                fun(_Nth, Now) ->
                    ok = waits_for_a_turn(Saver),
                    next_turn(Now)
                end,
                Turns,
                lists:seq(1, Waits)
            ),
            ok = waits_for_a_turn(Saver),
            [{Key, _}] = ?META_SRV:reserved(),
            ok = ?META_SRV:expire(Key),
            {ok, Theirs} = ask(Other, fun() -> ?META_SRV:reserve_save(Key, disk, self()) end),
            %% The turns are still held.
            ?assertEqual({{error, expired}, []}, answer(Saver, Saving)),
            ?assertEqual([], files(Root)),
            ?assertEqual([{Key, Theirs}], ?META_SRV:reserved()),
            ok = go_on(Held),
            ?assertEqual({0, []}, {?WRITER:current(), files(Root)}),
            ok = ?META_SRV:cancel_reservation(Key, Theirs),
            ?assertMatch({ok, Key}, ask(Saver, fun() -> save() end)),
            ok = ?META_SRV:forget(Key),
            ok = file:delete(file_of(Root, Key))
        end
     || {Payload, Waits} <- [{?PAYLOAD, 0}, {<<0:(100000 * 8)>>, 0}, {<<0:(100000 * 8)>>, 1}]
    ],
    ok.

%% Host and writer on a node where a save asks after this many milliseconds whether its reservation
%% still stands, and not after 15 s.
on_a_fresh_node(Root, Ms) ->
    {ok, _} = application:ensure_all_started(crypto),
    Module = erllama_cache_host,
    {ok, {Module, [{abstract_code, {_, Forms}}]}} =
        beam_lib:chunks(code:which(Module), [abstract_code]),
    Answer = fun(Anno) -> [{clause, Anno, [], [], [{integer, Anno, Ms}]}] end,
    {ok, Module, Beam} = compile:forms([
        case Form of
            {function, Anno, renew_every, 0, _} -> {function, Anno, renew_every, 0, Answer(Anno)};
            _ -> Form
        end
     || Form <- Forms
    ]),
    {module, Module} = code:load_binary(Module, "as for this test", Beam),
    Ms = Module:renew_every(),
    ok = erllama_fake:start(?TIER, Root),
    _ = start_writer(?LIMIT),
    ok.

%% Another process takes the key over and saves it, while this one is about to publish.
regranted_before_publishing(Config) ->
    [
        begin
            {Mine, Theirs, Key} = regranted_at(check_reservation, Payload),
            ?assertEqual({{error, expired}, {ok, Key}}, {Mine, Theirs}),
            ?assertEqual(<<"theirs">>, stored_payload(Config, Key)),
            ?assertNot(lists:member(cancel_reservation, calls())),
            regranted_is_over(Key, Config)
        end
     || Payload <- [<<"ours">>, binary:copy(<<"ours">>, 30000)]
    ].

%% The other one finds the file and adopts it: it is told of once, by the one who has the key.
regranted_after_publishing(Config) ->
    {Mine, Theirs, Key} = regranted_at(mark_published, <<"ours">>),
    ?assertEqual({{error, expired}, {ok, Key}}, {Mine, Theirs}),
    ?assertEqual(<<"ours">>, stored_payload(Config, Key)),
    regranted_is_over(Key, Config).

regranted_before_announcing(Config) ->
    {Mine, Theirs, Key} = regranted_at(announce_saved, <<"ours">>),
    ?assertEqual({{error, expired}, {ok, Key}}, {Mine, Theirs}),
    ?assertEqual(<<"ours">>, stored_payload(Config, Key)),
    [[Key, Lost, _, _, _], [Key, Valid, _, _, _]] = args(announce_saved),
    ?assertNotEqual(Lost, Valid),
    regranted_is_over(Key, Config).

%% What two savers of one key are told, the second of whom is granted it when the first makes this
%% call.
regranted_at(Call, Payload) ->
    ok = erllama_fake:forget_calls(),
    Self = self(),
    Second = actor(),
    TakeOver = fun([Key | _]) ->
        ok = ?META_SRV:expire(Key),
        Self ! {theirs, Key, ask(Second, fun() -> save(meta(), <<"theirs">>) end)}
    end,
    ok = erllama_fake:script(Call, [{before, TakeOver}]),
    Mine = save(meta(), Payload),
    receive
        {theirs, Key, Theirs} -> {Mine, Theirs, Key}
    after 0 -> error({not_called, Call})
    end.

regranted_is_over(Key, Config) ->
    ?assertEqual([Key], ?META_SRV:stored()),
    ?assertEqual(#{4 => 1}, erllama_cache_counters:all()),
    assert_only(file_of(?config(root, Config), Key), Config),
    ?assertMatch({ok, #{key := Key}, _}, ?DISK_SRV:load(?TIER, Key)),
    ok = file:delete(file_of(?config(root, Config), Key)),
    ok = ?META_SRV:forget(Key),
    ok = erllama_cache_counters:reset().

%% It asks for the key while that is being saved, and finds the file when it is answered.
turn_that_follows_waits_for_the_announcement(_Config) ->
    {Follower, Following} = follows_a_save(100000),
    [ok = erllama_fake:script(Call, [
        {before, fun([Key | _]) -> [Key] = ?META_SRV:waiting() end}
    ]) || Call <- [check_reservation, mark_published, announce_saved]],
    {ok, Key} = save(),
    ?assertMatch({stored, {ok, #{key := Key}, ?PAYLOAD}}, answer(Follower, Following)).

%% It sits out its time.
failure_answers_nobody_who_waits(Config) ->
    {Follower, Following} = follows_a_save(500),
    ok = erllama_fake:script(check_reservation, [
        {before, fun([Key | _]) -> ok = ?META_SRV:expire(Key) end}
    ]),
    ?assertEqual({error, expired}, save()),
    ?assertEqual({miss, miss}, answer(Follower, Following)),
    ?assertEqual([], files(?config(root, Config))).

%% A process that asks for the key of the next save as soon as that is reserved.
follows_a_save(Timeout) ->
    Follower = actor(),
    Following = tell(Follower, fun() ->
        receive
            {reserved, Key} -> {?META_SRV:await(Key, Timeout), ?DISK_SRV:load(?TIER, Key)}
        end
    end),
    ok = erllama_fake:script(dir, [
        {before, fun(_Args) ->
            [{Key, _Token}] = ?META_SRV:reserved(),
            Follower ! {reserved, Key},
            eventually(fun() -> ?META_SRV:waiting() =:= [Key] end)
        end}
    ]),
    {Follower, Following}.

%%% The final name is taken

%% The stored payload wins: others may be reading it.
valid_file_is_adopted(Config) ->
    {Key, Path} = saved_and_forgotten(Config),
    {ok, <<Header:48/binary, _/binary>> = File} = file:read_file(Path),
    {ok, #file_info{inode = Inode}} = file:read_file_info(Path),
    Size = byte_size(File),
    ?assertEqual({ok, Key}, save(meta(), <<"a longer payload, which is dropped">>)),
    ?assertEqual({ok, File}, file:read_file(Path)),
    ?assertMatch({ok, #file_info{inode = Inode}}, file:read_file_info(Path)),
    %% Told is what stands there.
    ?assertMatch([[Key, _, Path]], args(mark_published)),
    ?assertMatch([[Key, _, Size, Header, _]], args(announce_saved)),
    assert_only(Path, Config).

%% The host counts hits in the file itself: that does not make it invalid.
rewritten_hit_count_is_adopted(Config) ->
    {Key, Path} = saved_and_forgotten(Config),
    {ok, <<Before:12/binary, _:32, After/binary>>} = file:read_file(Path),
    Counted = <<Before/binary, 41:32/little, After/binary>>,
    ok = file:write_file(Path, Counted),
    ?assertEqual({ok, Key}, save(meta(), <<"dropped">>)),
    ?assertEqual({ok, Counted}, file:read_file(Path)),
    assert_only(Path, Config).

name_taken_while_writing(Config) ->
    {Key, Path} = saved_and_forgotten(Config),
    {ok, Valid} = file:read_file(Path),
    [
        begin
            ok = file:delete(Path),
            ok = erllama_fake:script(check_reservation, [
                {before, fun(_) -> ok = file:write_file(Path, Content) end}
            ]),
            ?assertEqual({ok, Key}, save(meta(), <<"ours">>)),
            ?assertEqual(Wins, stored_payload(Config, Key)),
            assert_only(Path, Config),
            ok = ?META_SRV:forget(Key)
        end
     || {Content, Wins} <- [{Valid, ?PAYLOAD}, {<<"no such file">>, <<"ours">>}]
    ].

damaged_file_is_replaced(Config) ->
    {Key, Path} = saved_and_forgotten(Config),
    {ok, Valid} = file:read_file(Path),
    [
        begin
            ?assertNotEqual(Valid, Damaged),
            ok = file:write_file(Path, Damaged),
            ?assertEqual({What, {ok, Key}}, {What, save(meta(), <<"whole">>)}),
            ?assertEqual({What, <<"whole">>}, {What, stored_payload(Config, Key)}),
            assert_only(Path, Config),
            ok = ?META_SRV:forget(Key)
        end
     || {What, Damaged} <- damaged(Valid)
    ].

damaged(Valid) ->
    Size = byte_size(Valid),
    Offset = Size - byte_size(payload(Valid)),
    <<_:72/binary, PromptLen:32/little, _/binary>> = Valid,
    TlvAt = 76 + PromptLen,
    [
        {empty, <<>>},
        {one_byte, <<"K">>},
        {header_only, binary:part(Valid, 0, 48)},
        {no_sections, binary:part(Valid, 0, 72)},
        {no_payload, binary:part(Valid, 0, Offset)},
        {truncated, binary:part(Valid, 0, Size - 1)},
        {trailing, <<Valid/binary, 0>>},
        {text, binary:copy(<<"not a cache file ">>, 1000)},
        {zeroes, <<0:(Size * 8)>>},
        {magic, at(0, <<"KVD">>, Valid)},
        {payload_bit, at(Size - 1, <<(binary:last(Valid) bxor 1)>>, Valid)},
        {crc, at(64, <<(binary:at(Valid, 64) bxor 1)>>, Valid)},
        {payload_bytes, at(40, <<16#ffffffffffffffff:64/little>>, Valid)},
        {payload_offset, at(48, <<16#ffffffffffffffff:64/little>>, Valid)},
        {payload_offset_low, at(48, <<0:64>>, Valid)},
        {payload_length, at(56, <<16#ffffffffffffffff:64/little>>, Valid)},
        {all_lengths, at(40, binary:copy(<<16#7fffffffffffffff:64/little>>, 3), Valid)},
        {prompt_length, at(72, <<16#ffffffff:32/little>>, Valid)},
        {tlv_length, at(TlvAt, <<16#ffffffff:32/little>>, Valid)},
        {tlv_value_length, at(TlvAt + 5, <<16#ffffffff:32/little>>, Valid)}
    ].

at(Position, New, Binary) ->
    <<Before:Position/binary, _:(byte_size(New))/binary, After/binary>> = Binary,
    <<Before/binary, New/binary, After/binary>>.

file_of_another_key_is_replaced(Config) ->
    {Key, Path} = saved_and_forgotten(Config),
    {ok, Other} = save(meta([99]), <<"another key's">>),
    {ok, _} = file:copy(file_of(?config(root, Config), Other), Path),
    ok = file:delete(file_of(?config(root, Config), Other)),
    ?assertEqual({ok, Key}, save(meta(), <<"its own">>)),
    ?assertEqual(<<"its own">>, stored_payload(Config, Key)),
    assert_only(Path, Config).

%% Opening one to read waits for a writer, who never comes: the timetrap would tell.
fifo_is_replaced(Config) ->
    {Key, Path} = saved_and_forgotten(Config),
    ok = file:delete(Path),
    case run_command("mkfifo", [Path]) of
        {0, _} ->
            ?assertEqual({ok, Key}, save()),
            ?assertMatch({ok, #file_info{type = regular}}, file:read_link_info(Path)),
            ?assertEqual(?PAYLOAD, stored_payload(Config, Key)),
            assert_only(Path, Config);
        _ ->
            {skip, "no mkfifo"}
    end.

link_is_replaced_and_its_target_stays(Config) ->
    {Key, Path} = saved_and_forgotten(Config),
    {ok, Valid} = file:read_file(Path),
    Elsewhere = fresh_dir("elsewhere", Config),
    Target = filename:join(Elsewhere, "target"),
    [
        begin
            ok = file:delete(Path),
            [ok = file:write_file(Target, Content) || is_binary(Content)],
            ok = file:make_symlink(To, Path),
            ?assertEqual({ok, Key}, save(meta(), <<"ours">>)),
            ?assertMatch({ok, #file_info{type = regular}}, file:read_link_info(Path)),
            ?assertEqual(<<"ours">>, stored_payload(Config, Key)),
            [?assertEqual({ok, Content}, file:read_file(Target)) || is_binary(Content)],
            assert_only(Path, Config),
            ok = ?META_SRV:forget(Key)
        end
     || {To, Content} <- [
            {Target, <<"precious">>},
            {Target, Valid},
            {filename:join(Elsewhere, "nothing"), none},
            {filename:basename(Path), none},
            {Elsewhere, none}
        ]
    ],
    ?assertEqual(["target"], files(Elsewhere)).

directory_is_an_error(Config) ->
    {Key, Path} = saved_and_forgotten(Config),
    ok = file:delete(Path),
    ok = file:make_dir(Path),
    ok = file:write_file(filename:join(Path, "kept"), <<>>),
    ?assertMatch({error, Reason} when is_atom(Reason), save()),
    ?assertEqual(cancel_reservation, lists:last(calls())),
    ?assertEqual([[Key, token(check_reservation)]], args(cancel_reservation)),
    ?assertEqual(["kept"], files(Path)),
    assert_only(Path, Config),
    %% No file for the host, left on purpose.
    ok = file:del_dir_r(Path).

%%% What is wrong with a build_meta map

missing_keys(Config) ->
    [
        begin
            ?assertEqual({error, {missing_key, Key}}, save(maps:remove(Key, meta()))),
            ?assertEqual([], calls_after_the_key())
        end
     || Key <- maps:keys(meta())
    ],
    ?assertEqual(0, ?WRITER:current()),
    assert_nothing_left(Config),
    ?assertMatch({ok, _}, save()).

invalid_values(Config) ->
    [
        begin
            ?assertEqual({{error, {invalid_meta, Key}}, Value},
                         {save((meta())#{Key => Value}), Value}),
            ?assertEqual([], calls_after_the_key())
        end
     || {Key, Values} <- invalid(), Value <- Values
    ],
    assert_nothing_left(Config),
    ?assertMatch({ok, _}, save()).

invalid() ->
    Hash = [<<0:248>>, <<0:264>>, <<0:255>>, <<0:257>>, <<>>, lists:duplicate(32, 0), undefined],
    Binary = ["text", <<1:7>>, 1],
    U64 = [-1, 1 bsl 64, 1.0, now, <<0:64>>],
    [
        {save_reason, [warm, <<"cold">>, "cold", 1]},
        {quant_bits, [-1, 256, 4.0, four, <<4>>]},
        {fingerprint, Hash},
        {fingerprint_mode, [unsafe, <<"safe">>, 0]},
        {quant_type, [<<"f16">>, "f16", 1]},
        {ctx_params_hash, Hash},
        {tokens, [<<1:32>>, [1 | 2], [1, a], [1.0], [<<1>>], [[1]], #{}, undefined]},
        {context_size, [-1, 1 bsl 32, 1.0, large]},
        {creation_time, U64},
        {last_used_time, U64},
        {hit_count, [-1, 1 bsl 32, 1.0, often]},
        {prompt_text, [undefined | Binary]},
        {hostname, Binary},
        {erllama_version, Binary},
        {save_reason_detail, Binary}
    ].

%% What just fits, and keys that nobody asked for.
extreme_values(_Config) ->
    [
        ?assertMatch({{ok, _}, _, _}, {save((meta([N]))#{Key => Value}), Key, Value})
     || {N, {Key, Value}} <- lists:zip(lists:seq(1, length(extreme())), extreme())
    ].

extreme() ->
    [
        {quant_bits, 0}, {quant_bits, 255},
        {context_size, 0}, {context_size, 16#ffffffff},
        {creation_time, 0}, {creation_time, 16#ffffffffffffffff},
        {last_used_time, 0}, {last_used_time, 16#ffffffffffffffff},
        {hit_count, 0}, {hit_count, 16#ffffffff},
        {prompt_text, <<0, 255, 128>>}, {prompt_text, binary:copy(<<"p">>, 3000000)},
        {save_reason_detail, binary:copy(<<"d">>, 70000)},
        {tokens, []}, {tokens, lists:seq(1, 300000)},
        {a_later_versions_key, {any, term}}
    ].

%% The host's parser takes no such file: saved, it would be deleted, and its key never load.
quant_type_of_no_table(Config) ->
    ok = erllama_fake:forget_calls(),
    Meta = (meta())#{quant_type := mxfp4},
    ?assertEqual({error, {unknown_quant_byte, 255}}, save(Meta)),
    ?assertEqual([], files(?config(root, Config))),
    ?assertNot(lists:keymember(reserve_save, 1, erllama_fake:calls())),
    ?assertEqual(#{}, erllama_cache_counters:all()),
    ?assertEqual(0, ?WRITER:current()).

defaults(Config) ->
    Earliest = erlang:system_time(second),
    {ok, Key} = save(),
    Latest = erlang:system_time(second),
    {ok, File} = file:read_file(file_of(?config(root, Config), Key)),
    <<"KVC", 1, 4, 1, 0:16, 4:32/little, 0:32, 4096:32/little, 0:32, Created:64/little,
      Used:64/little, _/binary>> = File,
    ?assert(Created >= Earliest andalso Created =< Latest),
    ?assertEqual(Created, Used),
    Tags = tags(File),
    {ok, Hostname} = inet:gethostname(),
    ?assertEqual(unicode:characters_to_binary(Hostname), maps:get(16#05, Tags)),
    ?assertEqual(<<"unknown">>, maps:get(16#06, Tags)),
    ?assertNot(is_map_key(16#07, Tags)),
    %% Undefined is as good as left out.
    Undefined = #{hostname => undefined, erllama_version => undefined,
                  save_reason_detail => undefined},
    {ok, Same} = save(maps:merge(meta([1]), Undefined)),
    {ok, SameFile} = file:read_file(file_of(?config(root, Config), Same)),
    Texts = [16#05, 16#06, 16#07],
    ?assertEqual(maps:with(Texts, Tags), maps:with(Texts, tags(SameFile))),
    %% Inside the host its version is known.
    ok = application:load({application, erllama, [{vsn, "0.5.1"}]}),
    try
        {ok, Inside} = save(meta([2])),
        {ok, Later} = file:read_file(file_of(?config(root, Config), Inside)),
        ?assertEqual(<<"0.5.1">>, maps:get(16#06, tags(Later)))
    after
        application:unload(erllama)
    end.

%%% Roots

root_as_string_and_binary(Config) ->
    Root = ?config(root, Config),
    [
        begin
            ok = erllama_fake:script(dir, [{return, Given}]),
            {ok, Key} = save(meta([N])),
            [_, _, Path] = lists:last(args(mark_published)),
            ?assertEqual(file_of(Given, Key), Path),
            ?assert(filelib:is_regular(Path))
        end
     || {N, Given} <- [{1, Root}, {2, list_to_binary(Root)}, {3, Root ++ "/"}]
    ].

root_with_a_nul(Config) ->
    Root = ?config(root, Config),
    [
        fails_and_is_undone({error, badarg}, Bad, ?PAYLOAD, Config)
     || Bad <- [Root ++ [0], <<(list_to_binary(Root))/binary, 0, "x">>]
    ].

%% A node reads and writes file names in one of two encodings, whatever the disk holds.
roots_beyond_ascii(Config) ->
    [
        begin
            Base = ?config(root, Config) ++ "/" ++ Flag,
            ok = file:make_dir(Base),
            Saved = on_peer(["erl", Flag], fun() -> save_beyond_ascii(Base) end),
            ?assertEqual(Expected, Saved),
            %% Their names mean nothing to this node.
            {0, _} = run_command("rm", ["-r", Base])
        end
     || {Flag, Expected} <- [
            {"+fnu", [ok, ok, ok, ok]},
            {"+fnl", [ok, {error, {unencodable, latin1}}, ok, ok]}
        ]
    ].

save_beyond_ascii(Base) ->
    _ = start_writer(1),
    BaseBin = list_to_binary(Base),
    Roots = [
        filename:join(Base, [$c, $a, $f, 16#e9]),
        filename:join(Base, [16#43a, 16#44d, 16#448]),
        <<BaseBin/binary, "/日本"/utf8>>,
        %% Latin-1, or any bytes that are no UTF-8.
        <<BaseBin/binary, "/", 16#e9, 16#ff>>
    ],
    [save_in(Root) || Root <- Roots].

save_in(Root) ->
    %% What the node cannot name it cannot create either, and it does not have to.
    Made = try file:make_dir(Root) catch error:badarg -> badarg end,
    ok = erllama_fake:start(?TIER, Root),
    Result = save(),
    ?assertEqual({0, []}, {?WRITER:current(), ?META_SRV:reserved()}),
    Outcome =
        case Result of
            {ok, Key} ->
                ok = Made,
                ?assertMatch([[Key, _, Path]] when is_list(Path) =:= is_list(Root),
                             args(mark_published)),
                [[_, _, Path]] = args(mark_published),
                {ok, File} = file:read_file(Path),
                ?assertEqual(?PAYLOAD, payload(File)),
                ok;
            {error, _} ->
                ?assertEqual(cancel_reservation, lists:last(calls())),
                Result
        end,
    ok = erllama_fake:stop(),
    Outcome.

%%% Owners that die

owner_dies_in_a_call_to_the_host(Config) ->
    Root = ?config(root, Config),
    Self = self(),
    Block = {before, fun(_Args) -> Self ! {blocked, self()}, receive never -> ok end end},
    [
        begin
            ok = erllama_fake:script(Call, [Block]),
            %% Only a save that fails cancels anything.
            [ok = script_failure() || Call =:= cancel_reservation],
            Owner = actor(),
            _ = tell(Owner, fun() -> save() end),
            receive {blocked, Owner} -> ok after 20000 -> error({not_called, Call}) end,
            ?assertEqual({Call, 1}, {Call, ?WRITER:current()}),
            kill(Owner),
            eventually(fun() -> ?WRITER:current() =:= 0 end),
            eventually(fun() -> open_files(Root) =:= [] end),
            eventually(fun() -> ?META_SRV:reserved() =:= [] end),
            %% Before it is marked as published, the host knows nothing of it, whatever is there.
            Published = lists:member(Call, [mark_published, announce_saved, incr]),
            ?assertEqual({Call, Published}, {Call, files(Root) =/= []}),
            Known = lists:member(Call, [announce_saved, incr]),
            ?assertEqual({Call, Known}, {Call, ?META_SRV:stored() =/= []}),
            case save() of
                {ok, _} -> ?assertNot(Known);
                {error, already_present} -> ?assert(Known)
            end,
            [ok = ?META_SRV:forget(Key) || Key <- ?META_SRV:stored()],
            [ok = file:delete(filename:join(Root, File)) || File <- files(Root)]
        end
     || Call <- host_calls() ++ [cancel_reservation]
    ].

%% The kill takes effect in the write, or else before anything is published.
owner_dies_in_a_long_write(Config) ->
    case filelib:is_dir("/proc/self/fd") of
        true ->
            Root = ?config(root, Config),
            ok = erllama_fake:script(check_reservation, [
                {before, fun(_Args) -> receive never -> ok end end}
            ]),
            Payload = binary:copy(<<"payload.">>, 8 * 1024 * 1024),
            Owner = actor(),
            _ = tell(Owner, fun() -> save(meta(), Payload) end),
            eventually(fun() -> open_files(Root) =/= [] end),
            kill(Owner),
            eventually(fun() -> ?WRITER:current() =:= 0 end),
            eventually(fun() -> open_files(Root) =:= [] end),
            eventually(fun() -> ?META_SRV:reserved() =:= [] end),
            ?assertEqual([], files(Root)),
            ok = erllama_fake:script(check_reservation, []),
            ?assertMatch({ok, _}, save());
        false ->
            {skip, "no /proc, in which a file without a name could be seen"}
    end.

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

%%% Slots and saves, in short

%% A process that waits for a slot, behind those who wait already.
wait_in_line() ->
    Before = length(?WRITER:waiters()),
    Actor = actor(),
    Ref = tell(Actor, fun() -> ?WRITER:acquire(infinity) end),
    eventually(fun() -> length(?WRITER:waiters()) =:= Before + 1 end),
    {Actor, Ref}.

waiting() ->
    [Pid || #{pid := Pid} <- ?WRITER:waiters()].

save() ->
    save(meta()).

save(Meta) ->
    save(Meta, ?PAYLOAD).

save(Meta, Payload) ->
    ?WRITER:save(?TIER, disk, Meta, Payload).

%% A process that collects no garbage for so long that nothing is closed by chance.
untidy_actor() ->
    actor([{min_heap_size, 1000000}]).

%% A file that stands in the root, of which the host knows nothing.
saved_and_forgotten(Config) ->
    {ok, Key} = save(),
    ok = ?META_SRV:forget(Key),
    ok = erllama_fake:forget_calls(),
    {Key, file_of(?config(root, Config), Key)}.

%% A small save, written and published at one go, checks its reservation before that.
calls_but_the_check() ->
    lists:delete(check_reservation, calls_after_the_key()).

fails_and_is_undone(Error, Root, Payload, Config) ->
    ok = erllama_fake:forget_calls(),
    ok = erllama_fake:script(dir, [{return, Root}]),
    ?assertEqual(Error, save(meta(), Payload)),
    ?assertEqual([reserve_save, dir, cancel_reservation], calls_but_the_check()),
    [[Key, Token]] = args(cancel_reservation),
    ?assertMatch([[Key, disk, _]], args(reserve_save)),
    ?assert(is_reference(Token)),
    ?assertEqual({0, []}, {?WRITER:current(), ?META_SRV:reserved()}),
    ok = nothing_open(?config(root, Config)),
    ?assertEqual(#{}, erllama_cache_counters:all()).

assert_nothing_left(Config) ->
    Root = ?config(root, Config),
    ?assertEqual([], files(Root)),
    ok = nothing_open(Root),
    ?assertEqual({[], []}, {?META_SRV:reserved(), ?META_SRV:stored()}),
    ?assertEqual(0, ?WRITER:current()).

%% Large files are closed by a thread of the library, which may not have come to that yet.
nothing_open(Root) ->
    eventually(fun() -> open_files(Root) =:= [] end).

assert_only(Path, Config) ->
    Root = ?config(root, Config),
    ?assertEqual([filename:basename(Path)], files(Root)),
    ok = nothing_open(Root),
    ?assertEqual([], ?META_SRV:reserved()),
    ?assertEqual(0, ?WRITER:current()).

%%% What the host was asked

%% Makes the next save fail and cancel its reservation.
script_failure() ->
    erllama_fake:script(dir, [{return, "/nowhere/at/all"}]).

%% What a save that succeeds calls.
host_calls() ->
    [encode_tokens, make, quant_byte, reserve_save, dir, check_reservation, mark_published,
     announce_saved, incr].

calls() ->
    [Name || {Name, _Args, _Caller} <- erllama_fake:calls()].

calls_after_the_key() ->
    [Name || Name <- calls(), not lists:member(Name, [make, quant_byte, encode_tokens])].

args(Name) ->
    [Args || {Called, Args, _Caller} <- erllama_fake:calls(), Called =:= Name].

token(Name) ->
    [[_Key, Token | _]] = args(Name),
    Token.

%%% What stands in a file

stored_payload(Config, Key) ->
    {ok, File} = file:read_file(file_of(?config(root, Config), Key)),
    payload(File).

payload(<<_:48/binary, Offset:64/little, Length:64/little, _/binary>> = File) ->
    <<_:Offset/binary, Payload:Length/binary>> = File,
    Payload.

stored_quant_byte(Config, Key) ->
    {ok, File} = file:read_file(file_of(?config(root, Config), Key)),
    #{16#03 := <<Byte>>} = tags(File),
    Byte.

tags(<<_:72/binary, PromptLen:32/little, _:PromptLen/binary, TlvLen:32/little, Tlv:TlvLen/binary,
       _/binary>>) ->
    maps:from_list([
        {Tag, Value} || <<Tag, Length:32/little, Value:Length/binary>> <= Tlv
    ]).

%%% The oracle

%% Two readers are asked, which share no code with each other or with the library.
the_host_takes([]) ->
    ok;
the_host_takes(Files) ->
    Refused = [
        {File, Reason} || File <- Files, {error, Reason} <- [erllama_fake_kvc:read(File)]
    ],
    case {Refused, oracle(["check", "--host" | Files])} of
        {[], {0, _}} -> ok;
        {_, {_, Output}} -> {fail, {not_for_the_host, Refused, Output}}
    end.

oracle(Args) ->
    Oracle = in_project("proofs/oracle/kvc_oracle.py"),
    run_command("python3", [Oracle | Args]).

%% A build_meta map as JSON. Its texts have nothing in them that has to be escaped.
json(Meta) ->
    ["{", lists:join(", ", [[$", atom_to_list(Key), "\": ", json(Key, Value)]
                            || {Key, Value} <- maps:to_list(Meta)]), "}"].

json(Key, Hash) when Key =:= fingerprint; Key =:= ctx_params_hash ->
    [$", binary:encode_hex(Hash), $"];
json(_Key, Integer) when is_integer(Integer) ->
    integer_to_list(Integer);
json(_Key, Atom) when is_atom(Atom) ->
    [$", atom_to_list(Atom), $"];
json(_Key, Text) when is_binary(Text) ->
    [$", Text, $"];
json(_Key, Integers) when is_list(Integers) ->
    ["[", lists:join(",", [integer_to_list(Integer) || Integer <- Integers]), "]"].

%%% Mounts

mount_tmpfs(Dir, Options) ->
    case run_command("mount", ["-t", "tmpfs", "-o", Options, "tmpfs", Dir]) of
        {0, _} -> ok;
        not_found -> {skip, "no mount"};
        {_, Output} -> {skip, "tmpfs cannot be mounted, which takes root: " ++ Output}
    end.

unmount(Dir) ->
    case file:read_file("/proc/mounts") of
        {ok, Mounts} ->
            case binary:match(Mounts, list_to_binary([" ", Dir, " "])) of
                nomatch -> ok;
                _ -> {0, _} = run_command("umount", [Dir]), ok
            end;
        {error, enoent} ->
            ok
    end.

%%% Other nodes

%% Runs `Fun' on another node, started by this command, and returns what it returns.
on_peer([Command | Args], Fun) ->
    {ok, Peer, _} = peer:start_link(#{
        connection => standard_io,
        exec => {os:find_executable(Command), Args},
        args => ["-pa" | code:get_path()]
    }),
    try
        peer:call(Peer, erlang, apply, [Fun, []], 20000)
    after
        peer:stop(Peer)
    end.
