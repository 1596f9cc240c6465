%% Loads by the caller itself, from erllama's tiers and from stores.
-module(erllama_cache_reader_SUITE).

-include("erllama_cache_erllama_util.hrl").
-include_lib("common_test/include/ct.hrl").
-include_lib("stdlib/include/assert.hrl").

-compile(export_all).

-import(erllama_cache_test_util, [files/1, open_files/1, file_of/2, flip/2, actor/0, ask/2]).
-import(erllama_cache_erllama_util, [
    meta/1, save/0, save/2, restart_writer/1, restart_tier_server/0, script_busy/0, args/1
]).
-import(erllama_cache_hooked_host, [hold_turns/0, go_on/1]).

-define(READER, erllama_cache_reader).

suite() ->
    erllama_cache_erllama_util:suite().

all() ->
    erllama_cache_erllama_util:all().

groups() ->
    erllama_cache_erllama_util:groups([
        loads_what_the_host_loads,
        asks_the_tier_server_for_its_root_only,
        asks_each_tier_server_once,
        loads_while_a_tier_server_that_was_asked_is_busy,
        gives_up_on_a_busy_tier_server_that_was_not_asked,
        misses_what_is_not_there,
        a_corrupt_file_is_removed_and_counted,
        a_sound_file_is_not_removed,
        a_file_without_the_secret_is_refused_and_stays,
        gives_up_while_it_waits_for_a_turn,
        gives_up_between_two_slices,
        loads_from_a_store,
        refuses_wrong_options,
        exits_without_a_tier_server
    ]).

loads_what_the_host_loads(_Config) ->
    {ok, Key} = save(),
    {ok, _, Theirs} = erllama_cache_disk_srv:load(?TIER, Key),
    {ok, Info, Ours} = ?READER:load(?TIER, Key),
    ?assertEqual(Theirs, Ours),
    ?assertMatch(#{save_reason := _, tokens := _, context_size := _}, Info).

asks_the_tier_server_for_its_root_only(_Config) ->
    {ok, Key} = save(),
    ok = restart_tier_server(),
    ok = erllama_fake:forget_calls(),
    {ok, _, _} = ?READER:load(?TIER, Key),
    ?assertMatch([{dir, [?TIER], _}], erllama_fake:calls()).

%% For loads and saves, of any process.
asks_each_tier_server_once(_Config) ->
    miss = ?READER:load(?TIER, <<7:256>>),
    {ok, Key} = save(),
    Load = fun() -> ?READER:load(?TIER, Key) end,
    [?assertMatch({ok, _, ?PAYLOAD}, Loaded) || Loaded <- [Load(), Load(), ask(actor(), Load)]],
    ?assertEqual([[?TIER]], args(dir)),
    ok = restart_tier_server(),
    [?assertMatch({ok, _, ?PAYLOAD}, Load()) || _ <- [1, 2]],
    ?assertEqual([[?TIER], [?TIER]], args(dir)).

loads_while_a_tier_server_that_was_asked_is_busy(_Config) ->
    {ok, Key} = save(),
    ok = script_busy(),
    ok = sys:suspend(?TIER),
    ?assertMatch({ok, _, ?PAYLOAD}, ?READER:load(?TIER, Key)),
    ?assertEqual(miss, ?READER:load(?TIER, <<7:256>>)),
    ok = sys:resume(?TIER).

gives_up_on_a_busy_tier_server_that_was_not_asked(_Config) ->
    {ok, Key} = save(),
    ok = restart_tier_server(),
    ok = script_busy(),
    ok = sys:suspend(?TIER),
    ?assertEqual({error, tier_busy}, ?READER:load(?TIER, Key)),
    ok = sys:resume(?TIER),
    ?assertMatch({ok, _, ?PAYLOAD}, ?READER:load(?TIER, Key)).

misses_what_is_not_there(_Config) ->
    ?assertEqual(miss, ?READER:load(?TIER, <<7:256>>)).

a_corrupt_file_is_removed_and_counted(Config) ->
    Root = ?config(root, Config),
    {ok, Key} = save(),
    ok = damage(file_of(Root, Key)),
    ?assertMatch({error, {corrupt, _}}, ?READER:load(?TIER, Key)),
    ?assertEqual([], files(Root)),
    ?assertMatch(#{10 := 1}, erllama_cache_counters:all()),
    ?assertEqual(miss, ?READER:load(?TIER, Key)),
    ?assertMatch(#{10 := 1}, erllama_cache_counters:all()).

%% As when a save has replaced it since the load.
a_sound_file_is_not_removed(Config) ->
    Root = ?config(root, Config),
    {ok, Key} = save(),
    {ok, Path} = erllama_cache_path:native(Root),
    ?assertEqual(false, erllama_cache_load:remove_corrupt(Path, Key, none)),
    ?assertMatch({ok, _, _}, ?READER:load(?TIER, Key)).

a_file_without_the_secret_is_refused_and_stays(Config) ->
    Root = ?config(root, Config),
    {ok, Key} = save(),
    _ = restart_writer(#{mac_key => fun() -> <<1:256>> end}),
    ?assertEqual({error, unauthenticated}, ?READER:load(?TIER, Key)),
    ?assertEqual([filename:basename(file_of(Root, Key))], files(Root)),
    ?assertEqual(false, is_map_key(10, erllama_cache_counters:all())).

gives_up_while_it_waits_for_a_turn(Config) ->
    {ok, Key} = save(),
    Turns = hold_turns(),
    ?assertEqual({error, timeout}, ?READER:load(?TIER, Key, #{timeout => 10})),
    ok = go_on(Turns),
    ?assertEqual([], open_files(?config(root, Config))),
    ?assertMatch({ok, _, _}, ?READER:load(?TIER, Key, #{timeout => 60000})).

%% No processor reads so much in one slice.
gives_up_between_two_slices(Config) ->
    Root = ?config(root, Config),
    Payload = binary:copy(<<"0123456789abcdef">>, 16 bsl 20),
    {ok, Key} = save(meta([1]), Payload),
    ?assertEqual({error, timeout}, ?READER:load(?TIER, Key, #{timeout => 0})),
    ?assertEqual([], open_files(Root)),
    ?assertMatch({ok, _, Payload}, ?READER:load(?TIER, Key)),
    %% The independent readers would take minutes.
    ok = file:delete(file_of(Root, Key)).

loads_from_a_store(Config) ->
    Root = filename:join(?config(root, Config), "store"),
    ok = file:make_dir(Root),
    {ok, _} = erllama_cache_store:start_link(reader_store, #{root => Root}),
    {ok, Key} = ?WRITER:save(reader_store, disk, meta([1]), <<"in a store">>),
    ?assertMatch({ok, _, <<"in a store">>}, ?READER:load(reader_store, Key)),
    ?assertMatch({ok, _, <<"in a store">>}, ?READER:load(reader_store, Key, #{timeout => 60000})),
    ?assertMatch(#{hits := 2}, erllama_cache_store:info(reader_store)),
    %% A store keeps a corrupt file until a save of its key replaces it.
    ok = damage(file_of(Root, Key)),
    ?assertMatch({error, {corrupt, _}}, ?READER:load(reader_store, Key)),
    ?assertEqual([filename:basename(file_of(Root, Key))], files(Root)),
    ok = file:delete(file_of(Root, Key)),
    ok = gen_server:stop(reader_store).

refuses_wrong_options(_Config) ->
    Load = fun(Options) -> ?READER:load(?TIER, <<7:256>>, Options) end,
    ?assertError({unknown_option, timeuot, timeout}, Load(#{timeuot => 1})),
    ?assertError({invalid_option, timeout, -1}, Load(#{timeout => -1})),
    ?assertError(function_clause, ?READER:load(?TIER, <<"short">>)).

exits_without_a_tier_server(_Config) ->
    ?assertExit({noproc, _}, ?READER:load(no_such_tier, <<7:256>>)).

%% In the middle of the payload.
damage(Path) ->
    {ok, File} = file:read_file(Path),
    file:write_file(Path, flip(File, byte_size(File) - 1)).
