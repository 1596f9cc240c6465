%% Whichever process is killed, of this application or of the host's cache: no other store ends, the
%% writer is back, and the host lives. The processes are counted, not named, so that one that is
%% added later is killed too. Each is killed fifteen times, each time in trees that are new.
-module(erllama_cache_supervision_SUITE).

-include_lib("common_test/include/ct.hrl").
-include_lib("stdlib/include/assert.hrl").

-export([suite/0, all/0, groups/0, init_per_suite/1, end_per_suite/1, init_per_group/2,
         end_per_group/2, init_per_testcase/2, end_per_testcase/2]).
-export([any_process_of_a_node_with_erllama/1, any_process_of_a_node_without/1,
         any_process_while_a_root_is_away/1, top_of_either_application/1]).
%% The application that stands in for erllama, and its supervisors.

-import(erllama_cache_test_util, [
    fresh_dir/2, eventually/1, actor/0, ask/2, kill/1
]).
-import(erllama_cache_erllama_util, [load_fakes/1, meta/1]).

-define(WRITER, erllama_cache_writer).
-define(OURS, erllama_cache_nif).
-define(HOSTS, erllama).
-define(TIER, supervision_tier).
-define(STORES, [supervision_a, supervision_b]).
-define(TIMES, 15).
%% Milliseconds.
-define(MOMENT, 5).

suite() ->
    [{timetrap, {minutes, 10}}].

all() ->
    erllama_cache_erllama_util:all() ++ [any_process_of_a_node_without].

groups() ->
    erllama_cache_erllama_util:groups([
        any_process_of_a_node_with_erllama,
        any_process_while_a_root_is_away,
        top_of_either_application
    ]).

init_per_suite(Config) ->
    {ok, Started} = application:ensure_all_started(crypto),
    %% Nobody wants to read of some hundred crashes.
    #{level := Level} = logger:get_primary_config(),
    ok = logger:set_primary_config(level, none),
    [{started, Started}, {level, Level} | Config].

end_per_suite(Config) ->
    ok = logger:set_primary_config(level, ?config(level, Config)),
    lists:foreach(fun application:stop/1, ?config(started, Config)).

init_per_group(KeyedBy, Config) ->
    ok = load_fakes(KeyedBy),
    Config.

end_per_group(_KeyedBy, _Config) ->
    load_fakes(tokens).

init_per_testcase(Case, Config) ->
    Named = fun(Name) -> fresh_dir(lists:concat([Case, "_", Name]), Config) end,
    [{dirs, [{Name, Named(Name)} || Name <- [?TIER | ?STORES]]} | Config].

end_per_testcase(_Case, _Config) ->
    stop_all().

%%% What is killed

any_process_of_a_node_with_erllama(Config) ->
    Start = fun() -> start_with_erllama(Config) end,
    [kill_nth(N, Start, [?HOSTS, ?OURS]) || N <- numbers(Start), _ <- lists:seq(1, ?TIMES)],
    ok.

any_process_of_a_node_without(Config) ->
    Start = fun() -> start_alone(Config) end,
    [kill_nth(N, Start, [?OURS]) || N <- numbers(Start), _ <- lists:seq(1, ?TIMES)],
    ok.

%% A store that cannot start anew for the moment ends nobody either.
any_process_while_a_root_is_away(Config) ->
    [Away | Others] = ?STORES,
    Dir = proplists:get_value(Away, ?config(dirs, Config)),
    Start = fun() ->
        ok = start_with_erllama(Config),
        ok = file:rename(Dir, Dir ++ ".away"),
        kill(whereis(Away)),
        eventually(fun() -> whereis(Away) =:= undefined end)
    end,
    Numbers = numbers(Start),
    ok = file:rename(Dir ++ ".away", Dir),
    %% It is back when its root is.
    Back = fun() ->
        ok = file:rename(Dir ++ ".away", Dir),
        eventually(fun() -> has_a_successor({Away, undefined}) end),
        ?assertMatch({ok, _}, save(Away, 1))
    end,
    [kill_nth(N, Start, [?HOSTS, ?OURS], Others, Back)
     || N <- Numbers, _ <- lists:seq(1, ?TIMES)],
    ok.

%% That ends its own application, as OTP has it, and not the other one.
top_of_either_application(Config) ->
    [
        begin
            ok = start_with_erllama(Config),
            [{Ours, _}, {Hosts, _}] = [{whereis(Top), Top}
                                       || Top <- [erllama_cache_nif_sup, erllama_sup]],
            Stores = pids(?STORES),
            case Killed of
                ?HOSTS ->
                    kill(Hosts),
                    eventually(fun() -> whereis(?WRITER) =:= undefined end),
                    ?assertEqual({Ours, Stores}, {whereis(erllama_cache_nif_sup), pids(?STORES)}),
                    %% Loads need no writer.
                    [?assertEqual(miss, erllama_cache_store:load(S, <<0:256>>)) || S <- ?STORES];
                ?OURS ->
                    kill(Ours),
                    eventually(fun() -> pids(?STORES) =:= [undefined, undefined] end),
                    ?assertEqual(Hosts, whereis(erllama_sup)),
                    ?assertMatch({ok, _}, save(?TIER, 1))
            end,
            stop_all()
        end
     || Killed <- [?HOSTS, ?OURS], _ <- lists:seq(1, ?TIMES)
    ],
    ok.

%% The numbers of the processes that there are.
numbers(Start) ->
    ok = Start(),
    Processes = processes_of([?HOSTS, ?OURS]),
    ct:pal("~p", [[{Pid, name(Pid)} || Pid <- Processes]]),
    ok = stop_all(),
    lists:seq(1, length(Processes)).

kill_nth(N, Start, Applications) ->
    kill_nth(N, Start, Applications, ?STORES, fun() -> ok end).

kill_nth(N, Start, Applications, Stores, Then) ->
    ok = Start(),
    Holder = actor(),
    ok = ask(Holder, fun() -> ?WRITER:acquire(0) end),
    %% When these were counted, there may have been one more that was only about to end.
    Processes = processes_of(Applications),
    Victim = lists:nth(min(N, length(Processes)), Processes),
    Name = name(Victim),
    Tops = [{Top, whereis(Top)} || Top <- tops(Applications)],
    Hosts = [Server || lists:member(?HOSTS, Applications),
                       Server <- [erllama_cache_meta_srv, ?TIER]],
    Before = [{Server, whereis(Server)} || Server <- [?WRITER | Hosts] ++ Stores],
    {Ending, Staying} = lists:partition(
        fun({_, Pid}) -> Pid =:= Victim orelse is_below(Pid, Victim) end, Before
    ),
    %% Those that end with it but trap exits do so a moment later: whoever starts them anew meets
    %% them.
    Held = [Pid || {_, Pid} <- Ending, Pid =/= Victim,
                   {trap_exit, true} =:= process_info(Pid, trap_exit)],
    [true = erlang:suspend_process(Pid) || Pid <- Held],
    kill(Victim),
    receive after ?MOMENT * length(Held) -> ok end,
    [true = erlang:resume_process(Pid) || Pid <- Held],
    eventually(fun() -> lists:all(fun has_a_successor/1, Ending) end),
    _ = Then(),
    ?assertEqual({Name, Tops}, {Name, now_as(Tops)}),
    ?assertEqual({Name, Staying}, {Name, now_as(Staying)}),
    %% No slot is lost, and all can be saved to.
    ?assertEqual({Name, 1}, {Name, ?WRITER:current()}),
    ok = ask(Holder, fun() -> ?WRITER:release() end),
    [?assertMatch({Name, Tier, {ok, _}}, {Name, Tier, save(Tier, N)})
     || Tier <- [?TIER || Hosts =/= []] ++ Stores],
    %% Nor does anybody end later.
    ?assertEqual({Name, Tops}, {Name, now_as(Tops)}),
    ?assertEqual({Name, Staying}, {Name, now_as(Staying)}),
    ok = stop_all().

%% One that has come to the end of its start.
has_a_successor({Server, Pid}) ->
    try sys:get_state(Server) of
        _ -> whereis(Server) =/= Pid
    catch
        exit:_ -> false
    end.

now_as(Servers) ->
    [{Server, whereis(Server)} || {Server, _} <- Servers].

%%% The processes

%% All below the tops of these applications, the oldest first. Nothing of theirs is elsewhere, but
%% for the masters that OTP gives them, and for what has just begun or is about to end.
processes_of(Applications) ->
    ok = eventually(fun() ->
        {_, Others} = below_and_others(Applications),
        lists:all(fun is_master/1, Others)
    end),
    {Below, _} = below_and_others(Applications),
    lists:sort(Below).

below_and_others(Applications) ->
    Tops = tops(Applications),
    lists:partition(
        fun(Pid) -> lists:any(fun(Top) -> lists:member(Top, ancestors(Pid)) end, Tops) end,
        [
            Pid
         || Pid <- processes(),
            {ok, Application} <- [application:get_application(Pid)],
            lists:member(Application, Applications),
            not lists:member(Pid, pids(Tops))
        ]
    ).

is_master(Pid) ->
    case process_info(Pid, current_function) of
        {current_function, {application_master, _, _}} -> true;
        _ -> false
    end.

tops(Applications) ->
    [Top || {Application, Top} <- [{?HOSTS, erllama_sup}, {?OURS, erllama_cache_nif_sup}],
            lists:member(Application, Applications)].

%% The one was started by the other, or by one that was.
is_below(Pid, Other) ->
    lists:any(
        fun(Ancestor) ->
            Ancestor =:= Other orelse is_atom(Ancestor) andalso whereis(Ancestor) =:= Other
        end,
        ancestors(Pid)
    ).

parent(Pid) ->
    case ancestors(Pid) of
        [Parent | _] when is_pid(Parent) -> Parent;
        [Parent | _] -> whereis(Parent);
        [] -> none
    end.

ancestors(Pid) ->
    case process_info(Pid, dictionary) of
        {dictionary, Dictionary} -> proplists:get_value('$ancestors', Dictionary, []);
        undefined -> []
    end.

name(Pid) ->
    case process_info(Pid, registered_name) of
        {registered_name, Name} -> Name;
        _ -> {below, parent_name(parent(Pid)), proc_lib:translate_initial_call(Pid)}
    end.

parent_name(none) -> none;
parent_name(undefined) -> none;
parent_name(Pid) -> name(Pid).

pids(Names) ->
    [whereis(Name) || Name <- Names].

save(Tier, N) ->
    Meta = meta([N, erlang:unique_integer([positive])]),
    ?WRITER:save(Tier, disk, Meta, <<"a payload">>).

%%% The applications

start_with_erllama(Config) ->
    Dirs = ?config(dirs, Config),
    ok = erllama_fake:start(?TIER),
    Root = proplists:get_value(?TIER, Dirs),
    ok = erllama_fake_app:load(?HOSTS, ?TIER, Root, []),
    ok = start_ours(Dirs),
    ok = application:start(?HOSTS).

start_alone(Config) ->
    start_ours(?config(dirs, Config)).

start_ours(Dirs) ->
    ok = application:load(?OURS),
    Stores = [{Store, #{root => proplists:get_value(Store, Dirs)}} || Store <- ?STORES],
    ok = application:set_env(?OURS, stores, Stores),
    application:start(?OURS).

stop_all() ->
    [
        begin
            _ = application:stop(Application),
            application:unload(Application)
        end
     || Application <- [?HOSTS, ?OURS]
    ],
    [erllama_fake:stop() || whereis(erllama_fake) =/= undefined],
    ok.
