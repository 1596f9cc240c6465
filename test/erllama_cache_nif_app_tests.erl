%% The application: what it starts, by its environment, alone and beside erllama.
-module(erllama_cache_nif_app_tests).

-include("erllama_cache_store_util.hrl").
-include_lib("eunit/include/eunit.hrl").

-import(erllama_cache_store_util, [set_env/1, save/2]).
-import(erllama_cache_test_util, [mode/1, file_of/2, kill/1, eventually/1]).

application_test_() ->
    erllama_cache_store_util:application_tests([
        fun starts_no_server_without_stores/1,
        fun starts_the_stores_of_its_environment/1,
        fun beside_erllama_the_writer_is_erllamas/1,
        fun an_invalid_configuration_is_named/1,
        fun a_store_that_cannot_start_stops_the_start/1
    ]).

starts_no_server_without_stores(_Root) ->
    ok = application:start(erllama_cache_nif),
    ?assertMatch([{erllama_cache_drain, _, _, _}],
                 supervisor:which_children(erllama_cache_nif_sup)),
    ?assertEqual(undefined, whereis(erllama_cache_writer)).

starts_the_stores_of_its_environment(Root) ->
    set_env(#{
        stores => [{store_a, #{root => Root}}, {store_b, #{root => Root, tier => ram_file}}],
        max_concurrent => 3, file_mode => 8#640
    }),
    ok = application:start(erllama_cache_nif),
    ?assertEqual(3, erllama_cache_writer:max_concurrent()),
    Key = save(store_a, 1),
    ?assertEqual(8#640, mode(file_of(Root, Key))),
    ?assertMatch({ok, _, ?PAYLOAD}, erllama_cache_store:load(store_b, Key)),
    %% A store that is killed comes back and knows its files.
    Pid = whereis(store_a),
    kill(Pid),
    eventually(fun() ->
        is_pid(whereis(store_a)) andalso whereis(store_a) =/= Pid andalso
            ets:whereis(store_a) =/= undefined
    end),
    _ = sys:get_state(store_a),
    ?assertMatch(#{files := 1}, erllama_cache_store:info(store_a)),
    ok = application:stop(erllama_cache_nif),
    _ = [?assertEqual(undefined, whereis(N)) || N <- [store_a, store_b, erllama_cache_writer]].

%% A node that runs erllama may have stores as well: its writer serves both.
beside_erllama_the_writer_is_erllamas(Root) ->
    ok = application:load({application, erllama, [{vsn, "0.5.1"}]}),
    try
        set_env(#{stores => [{store_a, #{root => Root}}]}),
        ok = application:start(erllama_cache_nif),
        ?assertEqual(undefined, whereis(erllama_cache_writer)),
        {ok, Writer} = erllama_cache_writer:start_link(),
        true = unlink(Writer),
        Key = save(store_a, 1),
        ?assertMatch({ok, _, ?PAYLOAD}, erllama_cache_store:load(store_a, Key)),
        ok = gen_server:stop(Writer)
    after
        application:unload(erllama)
    end.

an_invalid_configuration_is_named(Root) ->
    [
        begin
            set_env(#{stores => Stores}),
            {error, Reason} = application:start(erllama_cache_nif),
            Said = lists:flatten(io_lib:format("~0p", [Reason])),
            ?assertEqual({Expected, true}, {Expected, string:find(Said, Expected) =/= nomatch}),
            ?assertEqual(undefined, whereis(erllama_cache_nif_sup))
        end
     || {Stores, Expected} <- [
            {[{store_a, Root, []}], "{invalid_config,stores,{store_a"},
            {[{store_a, [{root, Root}, {tier, ram}]}], "{invalid_option,tier,ram}"},
            {store_a, "{invalid_config,stores,store_a}"},
            {[{store_a, #{root => Root, tier => ram}}], "{invalid_option,tier,ram}"},
            {[{store_a, #{}}], "{missing_option,root}"}
        ]
    ].

a_store_that_cannot_start_stops_the_start(Root) ->
    set_env(#{stores => [{store_a, #{root => filename:join(Root, "missing")}}]}),
    {error, Reason} = application:start(erllama_cache_nif),
    ?assertNotEqual(nomatch, string:find(io_lib:format("~p", [Reason]), "enoent")),
    ?assertEqual(undefined, whereis(erllama_cache_writer)).
