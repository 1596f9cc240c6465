%% Tier servers of erllama that lend each other files, on two nodes.
-module(erllama_cache_fetch_SUITE).

-include("erllama_cache_erllama_util.hrl").
-include_lib("common_test/include/ct.hrl").
-include_lib("stdlib/include/assert.hrl").

-compile(export_all).

-import(erllama_cache_test_util, [file_of/2, flip/2, actor/0, tell/2, ask/2, answer/2,
                                  eventually/1, fresh_dir/2]).
-import(erllama_cache_erllama_util, [
    meta/0, meta/1, save/2, restart_writer/1, assert_nothing_left/1, args/1
]).

-define(READER, erllama_cache_reader).
-define(GROUP, fetch_group).

suite() ->
    erllama_cache_erllama_util:suite().

all() ->
    erllama_cache_erllama_util:all().

groups() ->
    erllama_cache_erllama_util:groups([
        a_tier_takes_what_another_node_has,
        the_host_sees_a_save,
        whoever_waits_for_the_key_gets_it,
        an_offer_is_asked_for_again_after_a_long_reservation,
        what_is_gone_after_a_long_reservation_leaves_nothing,
        a_key_that_is_being_saved_is_a_conflict,
        what_is_here_is_not_taken_again,
        a_bad_file_leaves_nothing,
        a_published_file_is_not_undone,
        a_host_that_raises_is_an_error,
        nobody_has_it,
        a_file_larger_than_a_piece,
        without_peers_nobody_is_asked,
        into_a_store,
        refuses_wrong_options,
        exits_without_a_tier_server
    ]).

init_per_testcase(Case, Config) ->
    ok = erllama_cache_nodes_util:distribute(Case),
    {_, Node} = Other = erllama_cache_nodes_util:start(),
    Root = fresh_dir(list_to_atom(lists:concat([Case, "_other"])), Config),
    ok = erpc:call(Node, code, add_pathsa, [code:get_path()]),
    ok = erpc:call(Node, erllama_cache_erllama_util, load_fakes, [erllama_fake:keyed_by()]),
    ok = erpc:call(Node, erllama_fake, start, [?TIER, Root]),
    {ok, _} = erllama_cache_nodes_util:unlinked(Node, ?WRITER, start_link, [#{peers => ?GROUP}]),
    _ = restart_writer(#{peers => ?GROUP}),
    eventually(fun() ->
        length(pg:get_members(erllama_cache_peers, {tiers, ?GROUP})) =:= 2
    end),
    ok = erllama_fake:forget_calls(),
    [{other, Other}, {node, Node}, {other_root, Root} | Config].

end_per_testcase(_Case, Config) ->
    erllama_cache_nodes_util:stop(?config(other, Config)).

a_tier_takes_what_another_node_has(Config) ->
    Key = save_there(Config, <<"payload">>),
    ?assertEqual(miss, ?READER:load(?TIER, Key)),
    Before = counts(),
    ?assertEqual(ok, ?READER:fetch(?TIER, Key)),
    ?assertMatch({ok, _, <<"payload">>}, ?READER:load(?TIER, Key)),
    ?assertMatch({ok, _, <<"payload">>}, erllama_cache_disk_srv:load(?TIER, Key)),
    ?assertEqual(stored, erllama_cache_meta_srv:await(Key, 0)),
    Size = filelib:file_size(file_of(?config(root, Config), Key)),
    ?assertEqual([1, Size, 0], since(Before)).

the_host_sees_a_save(Config) ->
    Key = save_there(Config, <<"payload">>),
    ok = ?READER:fetch(?TIER, Key),
    ?assertEqual([reserve_save, mark_published, announce_saved],
                 [Name || {Name, _, _} <- erllama_fake:calls(), Name =/= dir]),
    ?assertMatch([[Key, disk, _Fetcher]], args(reserve_save)).

whoever_waits_for_the_key_gets_it(Config) ->
    Key = save_there(Config, <<"payload">>),
    Self = self(),
    ok = erllama_fake:script(mark_published, [{before, fun([_, _, _]) ->
        Self ! {published, self()},
        receive go_on -> ok end
    end}]),
    Fetcher = actor(),
    Fetched = tell(Fetcher, fun() -> ?READER:fetch(?TIER, Key) end),
    Publisher = receive {published, Pid} -> Pid end,
    Waiter = actor(),
    Waited = tell(Waiter, fun() -> erllama_cache_meta_srv:await(Key, 10000) end),
    Publisher ! go_on,
    ?assertEqual(stored, answer(Waiter, Waited)),
    ?assertEqual(ok, answer(Fetcher, Fetched)).

%% Making room can take longer than an offer stands.
an_offer_is_asked_for_again_after_a_long_reservation(Config) ->
    Key = save_there(Config, <<"payload">>),
    Node = ?config(node, Config),
    ok = erllama_fake:script(reserve_save, [{before, fun(_) -> await_no_lending(Node) end}]),
    ?assertEqual(ok, ?READER:fetch(?TIER, Key)),
    ?assertMatch({ok, _, <<"payload">>}, ?READER:load(?TIER, Key)).

what_is_gone_after_a_long_reservation_leaves_nothing(Config) ->
    Key = save_there(Config, <<"payload">>),
    Node = ?config(node, Config),
    File = file_of(?config(other_root, Config), Key),
    ok = erllama_fake:script(reserve_save, [{before, fun(_) ->
        ok = await_no_lending(Node),
        ok = file:delete(File)
    end}]),
    ?assertEqual(miss, ?READER:fetch(?TIER, Key)),
    ?assertMatch([_], args(cancel_reservation)),
    assert_nothing_left(Config).

%% Until the offer that was made has ended.
await_no_lending(Node) ->
    true = is_lending(Node),
    eventually(fun() -> not is_lending(Node) end).

is_lending(Node) ->
    Stacks = erpc:call(Node, fun() ->
        [process_info(Pid, current_stacktrace) || Pid <- processes()]
    end),
    lists:any(fun
        ({_, Stack}) -> lists:keymember(erllama_cache_lend, 1, Stack);
        (undefined) -> false
    end, Stacks).

a_key_that_is_being_saved_is_a_conflict(Config) ->
    Key = save_there(Config, <<"payload">>),
    Saver = actor(),
    {ok, _} = ask(Saver, fun() -> erllama_cache_meta_srv:reserve_save(Key, disk, self()) end),
    ?assertEqual({error, conflict}, ?READER:fetch(?TIER, Key)).

what_is_here_is_not_taken_again(Config) ->
    Key = save_there(Config, <<"payload">>),
    {ok, Key} = save(meta(), <<"payload">>),
    Before = counts(),
    ?assertEqual(ok, ?READER:fetch(?TIER, Key)),
    ?assertEqual([0, 0, 0], since(Before)).

a_bad_file_leaves_nothing(Config) ->
    Key = save_there(Config, <<"payload">>),
    File = file_of(?config(other_root, Config), Key),
    {ok, Good} = file:read_file(File),
    ok = file:write_file(File, flip(Good, byte_size(Good) - 1)),
    Before = counts(),
    ?assertEqual(miss, ?READER:fetch(?TIER, Key)),
    assert_nothing_left(Config),
    ?assertEqual(miss, erllama_cache_meta_srv:await(Key, 0)),
    ?assertEqual([0, 0, 1], since(Before)).

%% As with a save: the host adopts it when the process has ended.
a_published_file_is_not_undone(Config) ->
    Key = save_there(Config, <<"payload">>),
    ok = erllama_fake:script(announce_saved, [{return, {error, expired}}]),
    ?assertEqual({error, expired}, ?READER:fetch(?TIER, Key)),
    ?assertMatch({ok, _, <<"payload">>}, ?READER:load(?TIER, Key)),
    ?assertEqual([], args(cancel_reservation)),
    ok = erllama_fake:forget_calls(),
    Other = save_there(Config, meta([7]), <<"other">>),
    ok = erllama_fake:script(announce_saved, [{raise, exit, {timeout, announce}}]),
    ?assertMatch({error, {fetch_died, _}}, ?READER:fetch(?TIER, Other)),
    ?assertEqual([], args(cancel_reservation)),
    ?assertMatch({ok, _, <<"other">>}, ?READER:load(?TIER, Other)),
    eventually(fun() -> erllama_cache_meta_srv:await(Other, 0) =:= stored end).

a_host_that_raises_is_an_error(Config) ->
    Key = save_there(Config, <<"payload">>),
    ok = erllama_fake:script(reserve_save, [{raise, exit, {noproc, erllama_cache_meta_srv}}]),
    ?assertMatch({error, {fetch_died, {noproc, _}}}, ?READER:fetch(?TIER, Key)),
    assert_nothing_left(Config).

nobody_has_it(Config) ->
    ?assertEqual(miss, ?READER:fetch(?TIER, <<1:256>>)),
    assert_nothing_left(Config).

a_file_larger_than_a_piece(Config) ->
    Payload = rand:bytes(5000000),
    Key = save_there(Config, Payload),
    ?assertEqual(ok, ?READER:fetch(?TIER, Key, #{timeout => 20000, tier => disk})),
    ?assertMatch({ok, _, Payload}, ?READER:load(?TIER, Key)).

without_peers_nobody_is_asked(Config) ->
    Key = save_there(Config, <<"payload">>),
    _ = restart_writer(#{}),
    ?assertEqual(miss, ?READER:fetch(?TIER, Key)).

%% Which has peers of its own, or none.
into_a_store(Config) ->
    Root = fresh_dir(into_a_store_here, Config),
    {ok, Store} = erllama_cache_store:start_link(fetch_store, #{root => Root}),
    ?assertEqual(miss, ?READER:fetch(fetch_store, <<1:256>>)),
    ok = gen_server:stop(Store).

refuses_wrong_options(_Config) ->
    Fetch = fun(Options) -> ?READER:fetch(?TIER, <<1:256>>, Options) end,
    ?assertError({invalid_option, tier, ram}, Fetch(#{tier => ram})),
    ?assertError({unknown_option, timeuot, timeout}, Fetch(#{timeuot => 1})),
    ?assertError(function_clause, ?READER:fetch(?TIER, <<"short">>)),
    ?assertError({invalid_config, peers, "group"}, ?WRITER:start_link(#{peers => "group"})).

exits_without_a_tier_server(_Config) ->
    ?assertExit({noproc, _}, ?READER:fetch(no_such_tier, <<1:256>>)).

save_there(Config, Payload) ->
    save_there(Config, meta(), Payload).

save_there(Config, Meta, Payload) ->
    {ok, Key} = erpc:call(?config(node, Config), ?WRITER, save, [?TIER, disk, Meta, Payload]),
    Key.

%% They count since the node's first writer started.
counts() ->
    Info = ?WRITER:info(),
    [maps:get(Name, Info) || Name <- [fetched, fetched_bytes, fetch_failures]].

since(Before) ->
    lists:zipwith(fun erlang:'-'/2, counts(), Before).
