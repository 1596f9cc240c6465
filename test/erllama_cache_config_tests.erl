%% The writer's configuration: defaults, wrong values, unknown keys, its own environment and
%% erllama's.
-module(erllama_cache_config_tests).

-include_lib("eunit/include/eunit.hrl").

-import(erllama_cache_test_util, [stop/1]).

-define(WRITER, erllama_cache_writer).

config_test_() ->
    {foreach, fun environment/0, fun restore/1, [
        fun fills_in_defaults/0,
        fun refuses_wrong_values/0,
        fun hides_a_secret_given_in_the_wrong_way/0,
        fun names_the_nearest_key_for_an_unknown_one/0,
        fun refuses_unknown_keys_of_the_environment/0,
        fun leaves_the_rest_of_the_environment_alone/0,
        fun start_link_takes_the_limit_from_the_environment/0,
        fun start_link_refuses_invalid_limits/0
    ]}.

environment() ->
    application:get_all_env(erllama_cache_nif).

restore(Before) ->
    Now = application:get_all_env(erllama_cache_nif),
    _ = [application:unset_env(erllama_cache_nif, Key) || {Key, _} <- Now],
    application:set_env([{erllama_cache_nif, Before}]).

fills_in_defaults() ->
    ?assertMatch(
        #{max_concurrent := 3, max_inflight_bytes := infinity, file_mode := 8#600,
          host := erllama_cache_host_erllama, page_cache := keep, slow_save_ms := 10000},
        erllama_cache_config:complete(#{max_concurrent => 3})
    ).

refuses_wrong_values() ->
    Wrong = [
        {max_concurrent, 0}, {max_concurrent, 1 bsl 31}, {max_inflight_bytes, -1}, {host, "host"},
        {file_mode, 8#1000}, {digest, md5}, {page_cache, true}, {slow_save_ms, 0}
    ],
    [
        ?assertError(
            {invalid_config, Key, Value}, erllama_cache_config:complete(#{Key => Value})
        )
     || {Key, Value} <- Wrong
    ].

hides_a_secret_given_in_the_wrong_way() ->
    ?assertError(
        {invalid_config, mac_key, hidden}, erllama_cache_config:complete(#{mac_key => <<"secret">>})
    ).

names_the_nearest_key_for_an_unknown_one() ->
    Mistyped = [
        {max_concurent, max_concurrent}, {maxconcurrent, max_concurrent}, {slow_save, slow_save_ms},
        {hots, host}, {"digest", digest}, {<<"page-cache">>, page_cache}, {<<255>>, host},
        {{a, tuple}, host}
    ],
    [
        ?assertError(
            {unknown_config, Key, Nearest}, erllama_cache_config:complete(#{Key => 1})
        )
     || {Key, Nearest} <- Mistyped
    ].

refuses_unknown_keys_of_the_environment() ->
    ok = application:set_env(erllama_cache_nif, store, []),
    ?assertError({unknown_config, store, stores}, erllama_cache_config:environment()).

leaves_the_rest_of_the_environment_alone() ->
    ok = application:set_env(erllama_cache_nif, stores, []),
    ok = application:set_env(erllama_cache_nif, start_writer, false),
    ok = application:set_env(erllama_cache_nif, max_concurrent, 7),
    ?assertEqual(#{max_concurrent => 7}, erllama_cache_config:environment()).

start_link_takes_the_limit_from_the_environment() ->
    Default = erlang:system_info(schedulers) * 2 + 1,
    Started = fun() ->
        {ok, _} = ?WRITER:start_link(),
        Limit = ?WRITER:max_concurrent(),
        ok = stop(?WRITER),
        Limit
    end,
    LimitFrom = fun(Value) ->
        ok = application:set_env(erllama, writer_max_concurrent, Value),
        Started()
    end,
    try
        ?assertEqual(7, LimitFrom(7)),
        [?assertEqual(Default, LimitFrom(Bad)) || Bad <- [0, -1, 2.0, many, undefined]],
        ok = application:unset_env(erllama, writer_max_concurrent),
        ?assertEqual(Default, Started())
    after
        application:unset_env(erllama, writer_max_concurrent)
    end.

start_link_refuses_invalid_limits() ->
    [
        ?assertError(function_clause, ?WRITER:start_link(Bad))
     || Bad <- [0, -1, 1.0, many, "3", <<3>>, infinity]
    ],
    ?assertEqual(undefined, whereis(?WRITER)).
