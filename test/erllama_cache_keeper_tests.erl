%% Stores and the writer come back when they are killed. In every position of both applications'
%% trees: erllama_cache_supervision_SUITE.
-module(erllama_cache_keeper_tests).

-include("erllama_cache_store_util.hrl").
-include_lib("eunit/include/eunit.hrl").

-import(erllama_cache_store_util, [key/1, meta/1, set_env/1]).
-import(erllama_cache_test_util, [kill/1, eventually/1, eventually/2]).

keeper_test_() ->
    erllama_cache_store_util:application_tests([
        fun a_killed_server_is_restarted_alone/1
    ]).

%% Each comes back, however often it is killed, and no other is any the worse for it.
a_killed_server_is_restarted_alone(Root) ->
    Names = [store_a, store_b, erllama_cache_writer],
    [A, B] = [filename:join(Root, Dir) || Dir <- ["a", "b"]],
    _ = [ok = file:make_dir(Dir) || Dir <- [A, B]],
    set_env(#{stores => [{store_a, #{root => A}}, {store_b, #{root => B}}]}),
    ok = application:start(erllama_cache_nif),
    Keeper = fun(Id) ->
        {Id, Pid, _, _} = lists:keyfind(Id, 1, supervisor:which_children(erllama_cache_nif_sup)),
        Pid
    end,
    _ = [
        begin
            Others = [{Name, whereis(Name)} || Name <- Names, Name =/= Id],
            Before = whereis(Id),
            kill(Find(Id)),
            %% With its keeper it ends too, a moment later.
            eventually(fun() ->
                is_pid(Find(Id)) andalso not lists:member(whereis(Id), [undefined, Before])
            end),
            %% It has its name before it has started. Killed in between, it would count as one that
            %% cannot start, and its keeper would wait longer and longer.
            {error, unknown_call} = gen_server:call(Id, has_it_started, infinity),
            ?assertEqual(Others, [{Name, whereis(Name)} || {Name, _} <- Others])
        end
     || Find <- [fun erlang:whereis/1, Keeper], Id <- Names, _ <- lists:seq(1, 15)
    ],
    [
        begin
            eventually(fun() -> erllama_cache_store_lookup:keyed_by(Store) =/= error end),
            ?assertMatch({ok, _}, erllama_cache_writer:save(Store, disk, meta(1), ?PAYLOAD))
        end
     || Store <- [store_a, store_b]
    ],
    %% A root that is away.
    ok = file:rename(A, A ++ ".away"),
    kill(whereis(store_a)),
    kill(whereis(store_b)),
    eventually(fun() -> erllama_cache_store_lookup:keyed_by(store_b) =/= error end),
    ?assertMatch({ok, _, ?PAYLOAD}, erllama_cache_store:load(store_b, key(1))),
    ?assertExit({noproc, _}, erllama_cache_store:load(store_a, key(1))),
    ok = file:rename(A ++ ".away", A),
    %% The pauses between the tries have grown.
    eventually(fun() -> erllama_cache_store_lookup:keyed_by(store_a) =/= error end, 60000),
    ?assertMatch({ok, _, ?PAYLOAD}, erllama_cache_store:load(store_a, key(1))).
