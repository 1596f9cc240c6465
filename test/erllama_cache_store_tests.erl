%% The built-in store: its options, its index, reservations, eviction, and what it makes of the
%% files that it finds in a root.
-module(erllama_cache_store_tests).

-include_lib("eunit/include/eunit.hrl").
-include_lib("kernel/include/file.hrl").

%% Called in another node, and by the logger.
-export([start_in_node/2, save_in_node/3, load_in_node/2, unreadable_file/1, log/2]).

-define(STORE, store_under_test).
-define(PAYLOAD, <<"the payload">>).

%%% What runs

all_test_() ->
    {setup, fun silence/0, fun unsilence/1, [
        {foreach, fun setup/0, fun teardown/1, instantiators(store_tests())},
        {foreach, fun load_application/0, fun unload_application/1,
            instantiators(application_tests())}
    ]}.

%% Minutes are for disks that others are busy with: nothing here waits for a time to pass.
instantiators(Tests) ->
    [fun(Root) -> {timeout, 300, {with, Root, [Test]}} end || Test <- Tests].

store_tests() ->
    [
        fun starts_with_any_kind_of_path/1,
        fun a_relative_root_stays_where_it_is/1,
        fun refuses_what_is_no_root/1,
        fun refuses_unknown_and_wrong_options/1,
        fun a_name_is_taken_once/1,
        fun a_name_of_anothers_table_is_refused/1,
        fun child_spec_starts_a_store/1,
        fun stores_do_not_mix/1,
        fun a_store_has_one_tier/1,
        fun without_a_store_calls_exit/1,

        fun a_save_is_loaded/1,
        fun a_save_in_many_slices_is_loaded/1,
        fun key_is_that_of_a_save/1,
        fun key_wants_what_it_is_made_of/1,
        fun a_quant_type_without_a_byte_is_refused/1,
        fun a_file_has_the_permissions_of_the_configuration/1,
        fun a_load_is_noted_in_the_file/1,
        fun a_note_of_the_future_is_corrected/1,
        fun loads_change_nothing_while_no_note_is_due/1,
        fun a_miss_is_a_miss/1,
        fun delete_deletes/1,
        fun a_second_save_is_already_present/1,
        fun bad_meta_leaves_nothing/1,
        fun info_counts/1,
        fun works_while_the_server_does_not/1,
        fun a_load_finds_what_another_node_saved/1,
        fun a_save_adopts_what_another_node_saved/1,

        fun a_reserved_key_is_a_conflict/1,
        fun one_of_many_savers_of_a_key_wins/1,
        fun a_dead_owner_frees_its_key/1,
        fun a_dead_owner_leaves_a_published_file/1,
        fun a_dead_owner_leaves_no_bad_file/1,
        fun a_killed_saver_leaves_nothing_half/1,
        fun an_ended_lease_stands_until_taken/1,
        fun a_load_leaves_reservations_alone/1,
        fun a_lease_that_was_taken_over_leaves_no_watch/1,
        fun a_check_beside_loads_does_not_expire/1,
        fun a_start_leaves_reservations_alone/1,

        fun what_was_not_used_for_longest_is_evicted/1,
        fun a_file_above_the_bound_is_refused/1,
        fun reserved_room_is_not_given_twice/1,
        fun room_comes_back/1,
        fun a_start_makes_room/1,
        fun many_savers_stay_within_the_bound/1,
        fun two_bounded_stores_share_a_root/1,
        fun a_load_that_ends_at_once_is_heard_of/1,

        fun a_start_reads_headers_only/1,
        fun a_start_removes_what_is_proven_corrupt/1,
        fun a_start_keeps_later_versions/1,
        fun a_start_leaves_other_names_alone/1,
        fun a_start_leaves_what_is_no_file_alone/1,
        fun an_unreadable_file_is_not_corrupt/1,
        fun a_start_sweeps_what_nobody_writes/1,

        fun damage_is_found_by_a_load/1,
        fun a_corrupt_file_is_replaced_by_a_save/1,
        fun a_corrupt_file_can_be_deleted/1,
        fun a_link_is_not_followed/1,
        fun a_directory_in_the_way_is_an_error/1,
        fun a_root_that_is_gone_is_an_error/1,

        fun two_nodes_save_the_same_keys/1
    ].

application_tests() ->
    [
        fun starts_nothing_without_stores/1,
        fun starts_the_stores_of_its_environment/1,
        fun whoever_is_killed_comes_back_alone/1,
        fun in_a_node_with_erllama_the_writer_is_erllamas/1,
        fun a_configuration_that_is_none_is_named/1,
        fun a_store_that_cannot_start_stops_the_start/1
    ].

%% What is meant to crash here, and to be found corrupt, is nothing to read about.
silence() ->
    {ok, #{level := Level}} = logger:get_handler_config(default),
    ok = logger:set_handler_config(default, level, none),
    Level.

unsilence(Level) ->
    ok = logger:set_handler_config(default, level, Level).

setup() ->
    Root = make_root(),
    {ok, _} = erllama_cache_writer:start_link(#{host => erllama_cache_store}),
    Root.

teardown(Root) ->
    ok = gen_server:stop(erllama_cache_writer),
    ok = file:del_dir_r(Root).

load_application() ->
    ok = application:load(erllama_cache_nif),
    make_root().

unload_application(Root) ->
    _ = application:stop(erllama_cache_nif),
    ok = application:unload(erllama_cache_nif),
    ok = file:del_dir_r(Root).

make_root() ->
    Name = lists:concat([?MODULE, "_", os:getpid(), "_", erlang:unique_integer([positive])]),
    Root = filename:join(os:getenv("TMPDIR", "/tmp"), Name),
    ok = file:make_dir(Root),
    Root.

%%% Starting

starts_with_any_kind_of_path(Root) ->
    Unicode = filename:join(Root, [16#e9, 16#4e2d]),
    Raw = <<(list_to_binary(Root))/binary, "/", 16#ff, 16#fe>>,
    %% Without a UTF-8 locale it has no name in this VM.
    Nameable = case file:native_name_encoding() of
        utf8 ->
            [Unicode];
        latin1 ->
            ?assertEqual(
                {error, {unencodable, latin1}},
                erllama_cache_store:start_link(?STORE, #{root => Unicode})
            ),
            []
    end,
    _ = [
        begin
            ok = file:make_dir(Path),
            with_store(#{root => Path}, fun(Store) ->
                Key = save(Store, 1),
                ?assertMatch({ok, _, ?PAYLOAD}, erllama_cache_store:load(Store, Key)),
                ?assert(filelib:is_regular(erllama_cache_path:final(Path, Key)))
            end)
        end
     || Path <- Nameable ++ [unicode:characters_to_binary(Unicode ++ "b"), Raw]
    ].

%% The current directory is the whole node's, and anybody may change it.
a_relative_root_stays_where_it_is(Root) ->
    {ok, Before} = file:get_cwd(),
    [Here, There] = [filename:join(Root, Dir) || Dir <- ["here", "there"]],
    [ok = file:make_dir(Dir) || Dir <- [Here, There, filename:join(Here, "kv")]],
    try
        ok = file:set_cwd(Here),
        #{start := {Module, Function, [?STORE, _] = Args}} =
            erllama_cache_store:child_spec(?STORE, #{root => "kv"}),
        with_store(#{root => "kv"}, fun(Store) ->
            ok = file:set_cwd(There),
            Key = save(Store, 1),
            ?assertMatch({ok, _, ?PAYLOAD}, erllama_cache_store:load(Store, Key)),
            ?assertEqual([filename:basename(path(Here, Key))], list_dir(filename:join(Here, "kv"))),
            ?assertMatch(#{files := 1}, erllama_cache_store:info(Store))
        end),
        {ok, Restarted} = apply(Module, Function, Args),
        ?assertMatch(#{files := 1}, erllama_cache_store:info(?STORE)),
        ok = gen_server:stop(Restarted)
    after
        ok = file:set_cwd(Before)
    end.

refuses_what_is_no_root(Root) ->
    process_flag(trap_exit, true),
    File = filename:join(Root, "file"),
    ok = file:write_file(File, <<>>),
    Loop = filename:join(Root, "loop"),
    ok = file:make_symlink("loop", Loop),
    Refused = [
        {enoent, filename:join(Root, "missing")},
        {enoent, ""},
        {enotdir, File},
        {eloop, Loop},
        {enametoolong, filename:join(Root, lists:duplicate(300, $a))},
        {badarg, Root ++ [0]},
        {badarg, <<"a", 0>>},
        {badarg, [not_a_character]},
        {badarg, 42}
    ],
    _ = [
        ?assertEqual({error, Reason}, erllama_cache_store:start_link(?STORE, #{root => Path}))
     || {Reason, Path} <- Refused
    ],
    ?assertEqual(undefined, whereis(?STORE)),
    ?assertEqual(undefined, ets:whereis(?STORE)).

refuses_unknown_and_wrong_options(Root) ->
    Start = fun(Options) -> erllama_cache_store:start_link(?STORE, Options) end,
    Wrong = [{tier, ram}, {max_bytes, 0}, {max_bytes, 1.5}, {max_bytes, all}],
    _ = [
        ?assertError({invalid_option, Key, Value}, Start(#{root => Root, Key => Value}))
     || {Key, Value} <- Wrong
    ],
    ?assertError({unknown_option, max_byte, max_bytes}, Start(#{root => Root, max_byte => 1})),
    ?assertError({unknown_option, "teir", tier}, Start(#{root => Root, "teir" => disk})),
    ?assertError({missing_option, root}, Start(#{})),
    ?assertError(function_clause, erllama_cache_store:start_link("name", #{root => Root})).

a_name_is_taken_once(Root) ->
    with_store(#{root => Root}, fun(Store) ->
        Pid = whereis(Store),
        ?assertEqual(
            {error, {already_started, Pid}},
            erllama_cache_store:start_link(Store, #{root => Root})
        )
    end).

child_spec_starts_a_store(Root) ->
    Specs = [erllama_cache_store:child_spec(Name, #{root => Root}) || Name <- [one, two]],
    ?assertEqual(ok, supervisor:check_childspecs(Specs)),
    [#{start := {Module, Function, Args}} | _] = Specs,
    {ok, Pid} = apply(Module, Function, Args),
    ?assertEqual(Pid, whereis(one)),
    ok = gen_server:stop(Pid).

stores_do_not_mix(Root) ->
    [A, B] = [filename:join(Root, Dir) || Dir <- ["a", "b"]],
    _ = [ok = file:make_dir(Dir) || Dir <- [A, B]],
    with_store(store_a, #{root => A}, fun(StoreA) ->
        with_store(store_b, #{root => B}, fun(StoreB) ->
            Key = save(StoreA, 1, <<"a">>),
            ?assertEqual(miss, erllama_cache_store:load(StoreB, Key)),
            Key = save(StoreB, 1, <<"b">>),
            ok = erllama_cache_store:delete(StoreA, Key),
            ?assertEqual(miss, erllama_cache_store:load(StoreA, Key)),
            ?assertMatch({ok, _, <<"b">>}, erllama_cache_store:load(StoreB, Key)),
            ?assertMatch(#{files := 0, root := A}, erllama_cache_store:info(StoreA)),
            ?assertMatch(#{files := 1, root := B}, erllama_cache_store:info(StoreB))
        end)
    end).

a_store_has_one_tier(Root) ->
    with_store(#{root => Root, tier => ram_file}, fun(Store) ->
        ?assertEqual(
            {error, {wrong_tier, ram_file}},
            erllama_cache_writer:save(Store, disk, meta(1), ?PAYLOAD)
        ),
        ?assertMatch({ok, _}, erllama_cache_writer:save(Store, ram_file, meta(1), ?PAYLOAD))
    end).

without_a_store_calls_exit(_Root) ->
    Key = <<0:256>>,
    ?assertExit({noproc, _}, erllama_cache_store:load(?STORE, Key)),
    ?assertExit({noproc, _}, erllama_cache_store:delete(?STORE, Key)),
    ?assertExit({noproc, _}, erllama_cache_store:info(?STORE)),
    ?assertExit({noproc, _}, erllama_cache_writer:save(?STORE, disk, meta(1), ?PAYLOAD)),
    ?assertEqual(0, erllama_cache_writer:current()).

%%% Saving and loading

a_save_is_loaded(Root) ->
    with_store(#{root => Root}, fun(Store) ->
        Meta = (meta(1))#{
            save_reason => finish, quant_bits => 4, fingerprint_mode => gguf_chunked,
            quant_type => q4_k_m, tokens => [1, 0, 16#ffffffff, 16#1_0000_0002, -1],
            creation_time => 1_700_000_000, last_used_time => 1_700_000_001, hit_count => 7,
            prompt_text => <<"h", 16#c3, 16#a9>>, hostname => <<"host">>,
            erllama_version => <<"1.2.3">>, save_reason_detail => <<"because">>
        },
        {ok, Key} = erllama_cache_writer:save(Store, disk, Meta, ?PAYLOAD),
        {ok, Info, Payload} = erllama_cache_store:load(Store, Key),
        ?assertEqual(?PAYLOAD, Payload),
        Stored = Meta#{
            quant_byte => 7, tokens := <<1:32/little, 0:32, -1:32, 2:32/little, -1:32>>,
            file_size => filelib:file_size(path(Root, Key))
        },
        ?assertEqual(Stored, Info),
        ?assertEqual([filename:basename(path(Root, Key))], list_dir(Root))
    end).

%% 128 MiB are more than one slice of 20 ms writes or reads on anything but the fastest machine.
a_save_in_many_slices_is_loaded(Root) ->
    with_store(#{root => Root}, fun(Store) ->
        Payload = binary:copy(rand:bytes(1 bsl 20), 128),
        Key = save(Store, 1, Payload),
        {ok, #{file_size := Size}, Loaded} = erllama_cache_store:load(Store, Key),
        ?assert(Loaded =:= Payload),
        ?assertEqual(Size, filelib:file_size(path(Root, Key)))
    end).

key_is_that_of_a_save(Root) ->
    with_store(#{root => Root}, fun(Store) ->
        Expected = crypto:hash(sha256, <<1:256, 1, 2:256, 5:32/little>>),
        ?assertEqual({ok, Expected}, erllama_cache_store:key(meta(5))),
        ?assertEqual(Expected, save(Store, 5)),
        ?assertEqual(
            {error, {missing_key, tokens}}, erllama_cache_store:key(maps:remove(tokens, meta(5)))
        ),
        ?assertEqual(
            {error, {invalid_meta, tokens}}, erllama_cache_store:key((meta(5))#{tokens => [a]})
        ),
        %% Enough for the list to be encoded elsewhere.
        Many = lists:seq(1, 40000),
        Long = crypto:hash(sha256, [<<1:256, 1, 2:256>>, [<<T:32/little>> || T <- Many]]),
        ?assertEqual({ok, Long}, erllama_cache_store:key((meta(5))#{tokens => Many})),
        ?assertEqual(
            {error, {invalid_meta, tokens}},
            erllama_cache_store:key((meta(5))#{tokens => Many ++ [1.0]})
        )
    end).

key_wants_what_it_is_made_of(Root) ->
    Identity = maps:with([fingerprint, quant_type, ctx_params_hash, tokens], meta(5)),
    {ok, Key} = erllama_cache_store:key(Identity),
    with_store(#{root => Root}, fun(Store) -> ?assertEqual(Key, save(Store, 5)) end),
    [
        begin
            ?assertEqual(
                {error, {missing_key, Field}}, erllama_cache_store:key(maps:remove(Field, Identity))
            ),
            ?assertEqual(
                {error, {invalid_meta, Field}}, erllama_cache_store:key(Identity#{Field := 1.0})
            )
        end
     || Field <- maps:keys(Identity)
    ],
    ?assertEqual({ok, Key}, erllama_cache_store:key(Identity#{save_reason => no_reason})).

%% All of those share a byte, and so a key: one would be loaded for the other.
a_quant_type_without_a_byte_is_refused(Root) ->
    with_store(#{root => Root}, fun(Store) ->
        [
            begin
                Meta = (meta(1))#{quant_type := Type},
                Refused = {error, {invalid_meta, quant_type}},
                ?assertEqual(Refused, erllama_cache_writer:save(Store, disk, Meta, ?PAYLOAD)),
                ?assertEqual(Refused, erllama_cache_store:key(Meta))
            end
         || Type <- [mxfp4, tq1_0, q4_k, undefined]
        ],
        ?assertEqual([], list_dir(Root)),
        ?assertMatch(#{reservations := 0}, erllama_cache_store:info(Store))
    end).

a_file_has_the_permissions_of_the_configuration(Root) ->
    with_store(#{root => Root}, fun(Store) ->
        ?assertEqual(8#600, mode(path(Root, save(Store, 1)))),
        ok = gen_server:stop(erllama_cache_writer),
        {ok, Writer} = erllama_cache_writer:start_link(
            #{host => erllama_cache_store, file_mode => 8#664}
        ),
        %% The fixture stops it, in a process that outlives this one.
        true = unlink(Writer),
        ?assertEqual(8#664, mode(path(Root, save(Store, 2))))
    end).

%% For whoever evicts by last use after a restart; later, and only when the last note is an hour
%% old.
a_load_is_noted_in_the_file(Root) ->
    with_store(#{root => Root}, fun(Store) ->
        Meta = (meta(1))#{hit_count => 5, last_used_time => 1000},
        {ok, Key} = erllama_cache_writer:save(Store, disk, Meta, ?PAYLOAD),
        Before = erlang:system_time(second),
        ?assertMatch(
            {ok, #{hit_count := 5, last_used_time := 1000}, _}, erllama_cache_store:load(Store, Key)
        ),
        ok = erllama_cache_test_util:eventually(fun() ->
            {ok, #{last_used_time := Used}, ?PAYLOAD} = erllama_cache_store:load(Store, Key),
            Used >= Before
        end),
        {ok, #{hit_count := Hits}, _} = erllama_cache_store:load(Store, Key),
        ?assert(Hits >= 6),
        {ok, File} = file:read_file(path(Root, Key)),
        [{ok, _, _} = erllama_cache_store:load(Store, Key) || _ <- lists:seq(1, 100)],
        ?assertEqual({ok, File}, file:read_file(path(Root, Key)))
    end).

%% A clock was ahead: the file would be taken for just used at each start until it is that late.
a_note_of_the_future_is_corrected(Root) ->
    with_store(#{root => Root}, fun(Store) ->
        Meta = (meta(1))#{last_used_time => erlang:system_time(second) + 365 * 86400},
        {ok, Key} = erllama_cache_writer:save(Store, disk, Meta, ?PAYLOAD),
        ok = erllama_cache_test_util:eventually(fun() ->
            {ok, #{last_used_time := Used}, ?PAYLOAD} = erllama_cache_store:load(Store, Key),
            Used =< erlang:system_time(second)
        end)
    end).

%% Nor the times by which a backup knows what to send again. Notes are made in their order: when
%% that of another file is there, there was none of this one.
loads_change_nothing_while_no_note_is_due(Root) ->
    with_store(#{root => Root}, fun(Store) ->
        Save = fun(N, LastUsed) ->
            Meta = (meta(N))#{last_used_time => LastUsed},
            {ok, Key} = erllama_cache_writer:save(Store, disk, Meta, ?PAYLOAD),
            Key
        end,
        Key = Save(1, erlang:system_time(second)),
        Before = content_and_times(path(Root, Key)),
        [{ok, _, _} = erllama_cache_store:load(Store, Key) || _ <- lists:seq(1, 100)],
        Due = Save(2, 1000),
        ok = erllama_cache_test_util:eventually(fun() ->
            {ok, #{hit_count := Hits}, _} = erllama_cache_store:load(Store, Due),
            Hits > 0
        end),
        ?assertEqual(Before, content_and_times(path(Root, Key)))
    end).

%% The times when the content and the inode were last changed, to the nanosecond.
content_and_times(File) ->
    {0, Times} = erllama_cache_test_util:run_command("stat", ["-c", "%y %z", File]),
    {file:read_file(File), Times}.

a_miss_is_a_miss(Root) ->
    with_store(#{root => Root}, fun(Store) ->
        ?assertEqual(miss, erllama_cache_store:load(Store, <<0:256>>)),
        Key = save(Store, 1),
        ok = file:delete(path(Root, Key)),
        ?assertEqual(miss, erllama_cache_store:load(Store, Key)),
        ?assertMatch(#{files := 0, bytes := 0, misses := 2}, erllama_cache_store:info(Store)),
        ?assertEqual(Key, save(Store, 1)),
        ?assertError(function_clause, erllama_cache_store:load(Store, <<0:248>>))
    end).

delete_deletes(Root) ->
    with_store(#{root => Root}, fun(Store) ->
        Key = save(Store, 1),
        ?assertEqual(ok, erllama_cache_store:delete(Store, Key)),
        ?assertEqual([], list_dir(Root)),
        ?assertEqual(miss, erllama_cache_store:load(Store, Key)),
        ?assertEqual(ok, erllama_cache_store:delete(Store, Key)),
        ?assertEqual(Key, save(Store, 1))
    end).

a_second_save_is_already_present(Root) ->
    with_store(#{root => Root}, fun(Store) ->
        Key = save(Store, 1),
        ?assertEqual(
            {error, already_present},
            erllama_cache_writer:save(Store, disk, meta(1), <<"another">>)
        ),
        ?assertMatch({ok, _, ?PAYLOAD}, erllama_cache_store:load(Store, Key))
    end).

bad_meta_leaves_nothing(Root) ->
    with_store(#{root => Root}, fun(Store) ->
        Save = fun(Meta) -> erllama_cache_writer:save(Store, disk, Meta, ?PAYLOAD) end,
        ?assertEqual({error, {missing_key, fingerprint}}, Save(maps:remove(fingerprint, meta(1)))),
        ?assertEqual({error, {invalid_meta, tokens}}, Save((meta(1))#{tokens => [a]})),
        ?assertEqual({error, {invalid_meta, hostname}}, Save((meta(1))#{hostname => "string"})),
        ?assertMatch(#{files := 0, reservations := 0}, erllama_cache_store:info(Store)),
        ?assertEqual([], list_dir(Root)),
        ?assertMatch({ok, _}, Save(meta(1)))
    end).

info_counts(Root) ->
    with_store(#{root => Root}, fun(Store) ->
        Key = save(Store, 1),
        _ = save(Store, 2),
        {error, already_present} = erllama_cache_writer:save(Store, disk, meta(1), ?PAYLOAD),
        {ok, _, _} = erllama_cache_store:load(Store, Key),
        miss = erllama_cache_store:load(Store, <<0:256>>),
        corrupt_payload(path(Root, Key)),
        {error, _} = erllama_cache_store:load(Store, Key),
        {ok, _} = reserve(Store, <<1:256>>),
        %% The corrupt one takes its room, too.
        Bytes = bytes_in(Root),
        ?assertEqual(
            #{
                name => Store, root => Root, tier => disk, max_bytes => infinity, files => 2,
                bytes => Bytes, reservations => 1, saves => 2, duplicates => 1, hits => 1,
                misses => 1, refused => 1, evictions => 0
            },
            erllama_cache_store:info(Store)
        )
    end).

works_while_the_server_does_not(Root) ->
    with_store(#{root => Root}, fun(Store) ->
        Key = save(Store, 1),
        ok = sys:suspend(Store),
        Done = in_process(fun() ->
            {ok, _, ?PAYLOAD} = erllama_cache_store:load(Store, Key),
            miss = erllama_cache_store:load(Store, <<0:256>>),
            Other = save(Store, 2),
            #{files := 2} = erllama_cache_store:info(Store),
            ok = erllama_cache_store:delete(Store, Other),
            is_known(Store, Key)
        end),
        ok = sys:resume(Store),
        ?assert(Done)
    end).

a_load_finds_what_another_node_saved(Root) ->
    with_two_stores(Root, fun(Store, Other) ->
        Key = save(Other, 1),
        ?assertMatch(#{files := 0}, erllama_cache_store:info(Store)),
        ?assertMatch({ok, _, ?PAYLOAD}, erllama_cache_store:load(Store, Key)),
        Size = filelib:file_size(path(Root, Key)),
        ?assertMatch(#{files := 1, bytes := Size}, erllama_cache_store:info(Store)),
        ?assertEqual(
            {error, already_present}, erllama_cache_writer:save(Store, disk, meta(1), ?PAYLOAD)
        )
    end).

a_save_adopts_what_another_node_saved(Root) ->
    with_two_stores(Root, fun(Store, Other) ->
        Key = save(Other, 1, <<"was here first">>),
        ?assertEqual(Key, save(Store, 1, <<"came later">>)),
        ?assertMatch({ok, _, <<"was here first">>}, erllama_cache_store:load(Store, Key)),
        Size = filelib:file_size(path(Root, Key)),
        ?assertMatch(#{files := 1, bytes := Size}, erllama_cache_store:info(Store))
    end).

%%% Reservations

a_reserved_key_is_a_conflict(Root) ->
    _ = [
        with_store(#{root => Root, max_bytes => MaxBytes}, fun(Store) ->
            {Owner, {ok, Token}} = start_owner(fun() -> reserve(Store, key(1)) end),
            ?assertEqual(
                {error, conflict}, erllama_cache_writer:save(Store, disk, meta(1), ?PAYLOAD)
            ),
            %% Not even for the owner itself, and nobody else's business.
            ?assertEqual({error, conflict}, ask(Owner, fun() -> reserve(Store, key(1)) end)),
            Other = save(Store, 2),
            ok = ask(Owner, fun() -> erllama_cache_store:cancel(Store, key(1), Token) end),
            Key = save(Store, 1),
            _ = [ok = erllama_cache_store:delete(Store, K) || K <- [Key, Other]],
            kill(Owner)
        end)
     || MaxBytes <- [infinity, 1 bsl 20]
    ].

one_of_many_savers_of_a_key_wins(Root) ->
    with_store(#{root => Root}, fun(Store) ->
        Results = in_processes(20, fun(N) ->
            {N, erllama_cache_writer:save(Store, disk, meta(1), <<N>>)}
        end),
        Key = key(1),
        ?assertMatch([_], [N || {N, {ok, K}} <- Results, K =:= Key]),
        [{Winner, _}] = [Result || {_, {ok, _}} = Result <- Results],
        Others = lists:usort([Result || {N, Result} <- Results, N =/= Winner]),
        ?assertEqual([], Others -- [{error, already_present}, {error, conflict}]),
        ?assertMatch({ok, _, <<Winner>>}, erllama_cache_store:load(Store, Key)),
        ?assertMatch(#{files := 1, reservations := 0}, erllama_cache_store:info(Store))
    end).

a_dead_owner_frees_its_key(Root) ->
    _ = [
        with_store(#{root => Root, max_bytes => MaxBytes}, fun(Store) ->
            {Owner, {ok, Token}} = start_owner(fun() -> reserve(Store, key(1)) end),
            ?assertMatch(#{reservations := 1}, erllama_cache_store:info(Store)),
            kill(Owner),
            none_reserved(Store),
            ?assertEqual({error, expired}, erllama_cache_store:check(Store, key(1), Token)),
            ok = erllama_cache_store:delete(Store, save(Store, 1))
        end)
     || MaxBytes <- [infinity, 1 bsl 20]
    ],
    %% A key is free at once, whether the server has heard of the death or not.
    with_store(#{root => Root}, fun(Store) ->
        ok = sys:suspend(Store),
        {ok, _} = in_process(fun() -> reserve(Store, key(1)) end),
        Key = save(Store, 1),
        ok = sys:resume(Store),
        %% Now it hears of it, and leaves the file that is not the dead owner's.
        _ = sys:get_state(Store),
        ?assertMatch(#{files := 1, reservations := 0}, erllama_cache_store:info(Store)),
        ?assertMatch({ok, _, ?PAYLOAD}, erllama_cache_store:load(Store, Key))
    end).

a_dead_owner_leaves_a_published_file(Root) ->
    with_two_stores(Root, fun(Store, Other) ->
        Key = save(Other, 1),
        ok = die_published(Store, Key),
        eventually(fun() -> maps:get(files, erllama_cache_store:info(Store)) =:= 1 end),
        Size = filelib:file_size(path(Root, Key)),
        ?assertMatch(#{bytes := Size, reservations := 0}, erllama_cache_store:info(Store)),
        ?assertMatch({ok, _, ?PAYLOAD}, erllama_cache_store:load(Store, Key))
    end).

a_dead_owner_leaves_no_bad_file(Root) ->
    with_two_stores(Root, fun(Store, Other) ->
        Key = save(Other, 1),
        corrupt_payload(path(Root, Key)),
        ok = die_published(Store, Key),
        ok = die_published(Store, <<0:256>>),
        none_reserved(Store),
        ?assertMatch(#{files := 0}, erllama_cache_store:info(Store)),
        ?assertEqual(Key, save(Store, 1)),
        ?assertMatch({ok, _, ?PAYLOAD}, erllama_cache_store:load(Store, Key))
    end).

%% Killed while it writes: its reservation and its slot come back, and what stands in the root, if
%% the kill came too late, is a whole file.
a_killed_saver_leaves_nothing_half(Root) ->
    with_store(#{root => Root}, fun(Store) ->
        Payload = binary:copy(rand:bytes(1 bsl 20), 64),
        Saver = spawn(fun() -> save(Store, 1, Payload) end),
        eventually(fun() -> maps:get(reservations, erllama_cache_store:info(Store)) =:= 1 end),
        kill(Saver),
        none_reserved(Store),
        eventually(fun() -> erllama_cache_writer:current() =:= 0 end),
        case list_dir(Root) of
            [] ->
                ?assertEqual(miss, erllama_cache_store:load(Store, key(1)));
            [Name] ->
                ?assertEqual(filename:basename(path(Root, key(1))), Name),
                {ok, _, Loaded} = erllama_cache_store:load(Store, key(1)),
                ?assert(Loaded =:= Payload)
        end
    end).

%% A process that dies between publishing a file and telling of it.
die_published(Store, Key) ->
    in_process(fun() ->
        {ok, Token} = reserve(Store, Key),
        erllama_cache_store:mark_published(Store, Key, Token, "path")
    end).

an_ended_lease_stands_until_taken(Root) ->
    with_store(#{root => Root}, fun(Store) ->
        Key = key(1),
        {ok, Token} = reserve(Store, Key),
        end_lease(Store, Key),
        ?assertEqual(ok, erllama_cache_store:check(Store, Key, Token)),
        ?assertEqual({error, conflict}, in_process(fun() -> reserve(Store, Key) end)),
        end_lease(Store, Key),
        ?assertEqual(ok, erllama_cache_store:mark_published(Store, Key, Token, "path")),
        ?assertEqual({error, conflict}, in_process(fun() -> reserve(Store, Key) end)),

        end_lease(Store, Key),
        {Owner, {ok, Taken}} = start_owner(fun() -> reserve(Store, Key) end),
        Expired = {error, expired},
        ?assertEqual(Expired, erllama_cache_store:check(Store, Key, Token)),
        ?assertEqual(Expired, erllama_cache_store:mark_published(Store, Key, Token, "path")),
        ?assertEqual(Expired, erllama_cache_store:announce(Store, Key, Token, 1, <<>>, <<>>)),
        ?assertEqual(ok, erllama_cache_store:cancel(Store, Key, Token)),
        ?assertEqual(ok, erllama_cache_store:check(Store, Key, Taken)),
        kill(Owner)
    end).

end_lease(Store, Key) ->
    erllama_cache_index:end_lease(Store, Key).

%% A file is there before it is announced, and another node may have made it: a load that finds it
%% says nothing about the reservation.
a_load_leaves_reservations_alone(Root) ->
    with_two_stores(Root, fun(Store, Other) ->
        Key = save(Other, 1),
        {ok, Token} = reserve(Store, Key),
        {ok, _, _} = erllama_cache_store:load(Store, Key),
        ?assertEqual(ok, erllama_cache_store:check(Store, Key, Token)),
        {ok, _, _} = erllama_cache_store:load(Store, Key),
        ?assertEqual(ok, erllama_cache_store:mark_published(Store, Key, Token, "path")),
        {ok, _, _} = erllama_cache_store:load(Store, Key),
        ?assertEqual(ok, erllama_cache_store:announce(Store, Key, Token, 1, <<>>, <<>>)),
        ?assertMatch(#{files := 1, reservations := 0}, erllama_cache_store:info(Store))
    end).

%% Whoever dies first, the one who lost the key or the one who has it.
a_lease_that_was_taken_over_leaves_no_watch(Root) ->
    _ = [
        with_store(#{root => Root, max_bytes => MaxBytes}, fun(Store) ->
            {Loser, {ok, _}} = start_owner(fun() -> reserve(Store, key(1)) end),
            %% In an unbounded store the server hears of a reservation later.
            eventually(fun() -> watches(Store) =:= 1 end),
            end_lease(Store, key(1)),
            {Winner, {ok, Token}} = start_owner(fun() -> reserve(Store, key(1)) end),
            eventually(fun() -> watches(Store) =:= 1 end),
            case Dies of
                loser ->
                    kill(Loser),
                    ok = ask(Winner, fun() -> erllama_cache_store:check(Store, key(1), Token) end),
                    eventually(fun() -> watches(Store) =:= 1 end),
                    kill(Winner);
                winner ->
                    kill(Winner),
                    none_reserved(Store),
                    eventually(fun() -> watches(Store) =:= 0 end),
                    kill(Loser)
            end,
            none_reserved(Store),
            eventually(fun() -> watches(Store) =:= 0 end),
            %% And who has announced a file may die as well.
            {Saver, {ok, _}} = start_owner(fun() ->
                erllama_cache_writer:save(Store, disk, meta(1), ?PAYLOAD)
            end),
            kill(Saver),
            ok = erllama_cache_store:delete(Store, key(1))
        end)
     || MaxBytes <- [infinity, 1 bsl 20], Dies <- [loser, winner]
    ].

watches(Store) ->
    #{watches := Watches} = gen_server:call(Store, audit),
    Watches.

%% Loads note their uses in the row of a reservation too, and a check that renews the lease changes
%% the same row.
a_check_beside_loads_does_not_expire(Root) ->
    with_store(#{root => Root}, fun(Store) ->
        Key = key(1),
        {ok, Token} = reserve(Store, Key),
        Loader = spawn(fun() -> note_uses(Store, Key) end),
        Checked = [
            begin
                end_lease(Store, Key),
                erllama_cache_store:check(Store, Key, Token)
            end
         || _ <- lists:seq(1, 5000)
        ],
        kill(Loader),
        ?assertEqual([ok], lists:usort(Checked)),
        ok = erllama_cache_store:cancel(Store, Key, Token)
    end).

note_uses(Store, Key) ->
    _ = erllama_cache_index:use(Store, Key, erlang:system_time(millisecond)),
    note_uses(Store, Key).

%% A store that starts can be saved to before it has looked through its root.
a_start_leaves_reservations_alone(Root) ->
    Key = with_store(#{root => Root}, fun(Store) -> save(Store, 1) end),
    Turns = erllama_cache_hooked_host:all_turns(),
    ok = erllama_cache_hooked_host:taken(Turns),
    Test = self(),
    Starter = spawn_link(fun() ->
        with_store(#{root => Root}, fun(_Store) ->
            Test ! started,
            receive stop -> ok end
        end)
    end),
    eventually(fun() -> is_pid(whereis(?STORE)) end),
    ok = erllama_cache_hooked_host:waits_for_a_turn(whereis(?STORE)),
    {ok, Token} = reserve(?STORE, Key),
    ok = erllama_cache_hooked_host:go_on(Turns),
    receive started -> ok end,
    ?assertEqual(ok, erllama_cache_store:check(?STORE, Key, Token)),
    ?assertEqual({error, conflict}, in_process(fun() -> reserve(?STORE, Key) end)),
    Size = filelib:file_size(path(Root, Key)),
    ?assertEqual(ok, erllama_cache_store:announce(?STORE, Key, Token, Size, <<>>, <<>>)),
    ?assertMatch(#{files := 1, bytes := Size}, erllama_cache_store:info(?STORE)),
    Monitor = monitor(process, Starter),
    Starter ! stop,
    receive {'DOWN', Monitor, process, Starter, normal} -> ok end.

%%% Eviction

-define(BIG, 10000).
%% What the store reserves for a file with a payload of ?BIG bytes and nothing optional.
-define(ROOM, (?BIG + 260)).

what_was_not_used_for_longest_is_evicted(Root) ->
    with_store(#{root => Root, max_bytes => 4 * ?ROOM}, fun(Store) ->
        _ = [save_big(Store, N) || N <- [1, 2, 3, 4]],
        ?assertEqual([1, 2, 3, 4], stored(Root, 6)),
        _ = save_big(Store, 5),
        ?assertEqual([2, 3, 4, 5], stored(Root, 6)),
        %% 2 and 3 are next, by the server's last look: it has to see that 2 was used since.
        {ok, _, _} = erllama_cache_store:load(Store, key(2)),
        _ = save_big(Store, 6),
        ?assertEqual([2, 4, 5, 6], stored(Root, 6)),
        ?assertEqual(miss, erllama_cache_store:load(Store, key(3))),
        ?assertMatch(#{files := 4, evictions := 2}, erllama_cache_store:info(Store)),
        %% A second save of a key that is stored makes no room.
        {error, already_present} = erllama_cache_writer:save(Store, disk, big_meta(2), <<>>),
        ?assertEqual([2, 4, 5, 6], stored(Root, 6))
    end).

a_file_above_the_bound_is_refused(Root) ->
    with_store(#{root => Root, max_bytes => ?ROOM}, fun(Store) ->
        Key = save_big(Store, 1),
        ?assertEqual(
            {error, exceeds_max_bytes},
            erllama_cache_writer:save(Store, disk, big_meta(2), <<0:((?BIG + 1) * 8)>>)
        ),
        ?assertMatch({ok, _, _}, erllama_cache_store:load(Store, Key)),
        ?assertMatch(#{evictions := 0}, erllama_cache_store:info(Store))
    end).

%% Room that a running save takes is no more to be had than that of a file; files make way for it.
reserved_room_is_not_given_twice(Root) ->
    with_store(#{root => Root, max_bytes => 2 * ?ROOM}, fun(Store) ->
        _ = save_big(Store, 1),
        {Owner, {ok, _}} = start_owner(fun() ->
            erllama_cache_store:reserve(Store, disk, <<0:256>>, ?ROOM + 100)
        end),
        ?assertEqual([], stored(Root, 1)),
        {ok, Small} = erllama_cache_writer:save(Store, disk, meta(3), ?PAYLOAD),
        ?assertEqual(
            {error, no_room}, erllama_cache_writer:save(Store, disk, big_meta(2), big_payload())
        ),
        %% And nothing goes in vain.
        ?assertMatch({ok, _, ?PAYLOAD}, erllama_cache_store:load(Store, Small)),
        kill(Owner),
        eventually(fun() ->
            {error, no_room} =/=
                erllama_cache_writer:save(Store, disk, big_meta(2), big_payload())
        end),
        ?assertEqual([2], stored(Root, 2))
    end).

%% Whatever becomes of a file or a reservation, its room is free afterwards: what fills the whole
%% store still fits, and nothing had to be evicted for it.
room_comes_back(Root) ->
    with_store(#{root => Root, max_bytes => 2 * ?ROOM}, fun(Store) ->
        Whole = binary:copy(<<0>>, 2 * ?ROOM - 260),
        Gone = [
            fun() -> ok = erllama_cache_store:delete(Store, save_big(Store, 1)) end,
            fun() ->
                ok = file:delete(path(Root, save_big(Store, 1))),
                miss = erllama_cache_store:load(Store, key(1))
            end,
            fun() ->
                {ok, _} = in_process(fun() -> reserve(Store, key(1)) end),
                none_reserved(Store)
            end,
            fun() ->
                {ok, Token} = reserve(Store, key(1)),
                ok = erllama_cache_store:cancel(Store, key(1), Token)
            end,
            fun() ->
                ok = die_published(Store, key(1)),
                none_reserved(Store)
            end,
            fun() ->
                ok = file:make_dir(path(Root, key(1))),
                {error, _} = erllama_cache_writer:save(Store, disk, big_meta(1), big_payload()),
                ok = file:del_dir(path(Root, key(1)))
            end
        ],
        _ = [
            begin
                _ = Goes(),
                {ok, Key} = erllama_cache_writer:save(Store, disk, big_meta(2), Whole),
                ok = erllama_cache_store:delete(Store, Key)
            end
         || Goes <- Gone
        ],
        _ = sys:get_state(Store),
        ?assertMatch(#{files := 0, bytes := 0, evictions := 0}, erllama_cache_store:info(Store))
    end).

a_start_makes_room(Root) ->
    with_store(#{root => Root}, fun(Store) ->
        _ = [
            {ok, _} = erllama_cache_writer:save(
                Store, disk, (big_meta(N))#{last_used_time => 1000 - N}, big_payload()
            )
         || N <- [1, 2, 3]
        ]
    end),
    with_store(#{root => Root, max_bytes => 2 * ?ROOM}, fun(Store) ->
        ?assertEqual([1, 2], stored(Root, 3)),
        ?assertMatch(#{files := 2, evictions := 1}, erllama_cache_store:info(Store))
    end).

%% At no time do the files take more than the bound, whoever saves and loads; and no file is left
%% that the index does not know, for it would never be evicted. No key is saved twice, so that the
%% names of one listing were there together, whenever each file is then measured.
many_savers_stay_within_the_bound(Root) ->
    {Savers, Saves, MaxBytes} = {8, 30, 10 * ?ROOM},
    with_store(#{root => Root, max_bytes => MaxBytes}, fun(Store) ->
        in_processes(Savers, fun(Saver) ->
            _ = [
                begin
                    N = Saver * Saves + I,
                    Key = key(N),
                    %% The neighbour's file of the same turn: not there yet, there, or gone again.
                    _ = erllama_cache_store:load(Store, key(Saver rem Savers * Saves + Saves + I)),
                    ?assertEqual(
                        {ok, Key},
                        erllama_cache_writer:save(Store, disk, big_meta(N), big_payload())
                    ),
                    ?assert(bytes_in(Root) =< MaxBytes)
                end
             || I <- lists:seq(1, Saves)
            ]
        end),
        %% What loads have found is in the index when the server has heard of it.
        _ = sys:get_state(Store),
        Unknown = [
            N
         || N <- lists:seq(1, (Savers + 1) * Saves), not is_known(Store, key(N)),
            filelib:is_file(path(Root, key(N)))
        ],
        ?assertEqual([], Unknown),
        ?assertMatch(#{reservations := 0}, erllama_cache_store:info(Store)),
        Whole = binary:copy(<<0>>, MaxBytes - 260),
        ?assertMatch({ok, _}, erllama_cache_writer:save(Store, disk, big_meta(1), Whole)),
        ?assertEqual([filename:basename(path(Root, key(1)))], list_dir(Root))
    end).

%% Each bounds what it knows of, and forgets what the other has evicted.
two_bounded_stores_share_a_root(Root) ->
    {MaxBytes, Numbers} = {3 * ?ROOM, lists:seq(1, 40)},
    with_store(#{root => Root, max_bytes => MaxBytes}, fun(Store) ->
        with_store(other_store, #{root => Root, max_bytes => MaxBytes}, fun(Other) ->
            Load = fun(Name, N) ->
                case erllama_cache_store:load(Name, key(N)) of
                    {ok, _, Payload} -> Payload =:= big_payload();
                    miss -> true
                end
            end,
            _ = in_processes(2, fun(I) ->
                Mine = lists:nth(I, [Store, Other]),
                [
                    begin
                        Saved = erllama_cache_writer:save(Mine, disk, big_meta(N), big_payload()),
                        ?assert(lists:member(Saved, [{ok, key(N)}, {error, already_present}])),
                        ?assert(Load(Mine, N)),
                        ?assert(Load(Mine, max(1, N - 2)))
                    end
                 || N <- Numbers
                ]
            end),
            ?assert(bytes_in(Root) =< 2 * MaxBytes),
            %% A save makes room for what loads have found, too.
            _ = [
                begin
                    _ = [Load(Name, N) || N <- Numbers],
                    {ok, _} = erllama_cache_writer:save(Name, disk, big_meta(New), big_payload()),
                    ok = its_books_balance(Name, #{max_bytes => MaxBytes}),
                    #{bytes := Bytes} = erllama_cache_store:info(Name),
                    ?assert(Bytes =< MaxBytes)
                end
             || {Name, New} <- [{Store, 41}, {Other, 42}]
            ],
            _ = [
                ok = erllama_cache_store:delete(Name, key(N))
             || Name <- [Store, Other], N <- Numbers ++ [41, 42]
            ],
            ?assertEqual([], list_dir(Root)),
            _ = [sys:get_state(Name) || Name <- [Store, Other]],
            _ = [?assertMatch(#{used := 0, should := 0, watches := 0},
                              gen_server:call(Name, audit)) || Name <- [Store, Other]]
        end)
    end).

%% In a bounded store the server enters what a load has found. It does so when the process that
%% loaded is dead.
a_load_that_ends_at_once_is_heard_of(Root) ->
    with_store(#{root => Root, max_bytes => 2 * ?ROOM}, fun(Store) ->
        with_store(other_store, #{root => Root}, fun(Other) ->
            Key = save_big(Other, 1),
            ok = sys:suspend(Store),
            {ok, _, _} = in_process(fun() -> erllama_cache_store:load(Store, Key) end),
            {ok, _, _} = in_process(fun() -> erllama_cache_store:load(Store, Key) end),
            ?assertNot(is_known(Store, Key)),
            ok = sys:resume(Store),
            Size = filelib:file_size(path(Root, Key)),
            ?assertMatch(#{used := Size, should := Size}, gen_server:call(Store, audit)),
            ?assert(is_known(Store, Key))
        end)
    end).

is_known(Store, Key) ->
    erllama_cache_index:row(Store, Key) =/= none.

save_big(Store, N) ->
    {ok, Key} = erllama_cache_writer:save(Store, disk, big_meta(N), big_payload()),
    %% Last uses are compared by the millisecond.
    tick(erlang:system_time(millisecond)),
    Key.

tick(Now) ->
    case erlang:system_time(millisecond) of
        Now -> tick(Now);
        _Later -> ok
    end.

big_meta(N) ->
    (meta(N))#{hostname => <<>>, erllama_version => <<>>}.

big_payload() ->
    binary:copy(<<"x">>, ?BIG).

stored(Root, UpTo) ->
    [N || N <- lists:seq(1, UpTo), filelib:is_file(path(Root, key(N)))].

%% Files may go while they are counted.
bytes_in(Root) ->
    lists:sum([filelib:file_size(filename:join(Root, Name)) || Name <- list_dir(Root)]).

%%% Starting on what is there

a_start_reads_headers_only(Root) ->
    {Good, Bad} = with_store(#{root => Root}, fun(Store) -> {save(Store, 1), save(Store, 2)} end),
    corrupt_payload(path(Root, Bad)),
    with_store(#{root => Root}, fun(Store) ->
        Bytes = bytes_in(Root),
        ?assertMatch(#{files := 2, bytes := Bytes}, erllama_cache_store:info(Store)),
        ?assertMatch({ok, _, ?PAYLOAD}, erllama_cache_store:load(Store, Good)),
        ?assertEqual(
            {error, already_present}, erllama_cache_writer:save(Store, disk, meta(1), ?PAYLOAD)
        ),
        ?assertEqual({error, {corrupt, digest_mismatch}}, erllama_cache_store:load(Store, Bad))
    end).

a_start_removes_what_is_proven_corrupt(Root) ->
    Key = with_store(#{root => Root}, fun(Store) -> save(Store, 1) end),
    {ok, Good} = file:read_file(path(Root, Key)),
    Damaged = #{
        <<1:256>> => {truncated, <<>>},
        <<2:256>> => {truncated, binary:part(Good, 0, 71)},
        <<3:256>> => {truncated, binary:part(Good, 0, byte_size(Good) - 1)},
        <<4:256>> => {trailing_bytes, <<Good/binary, 0>>},
        <<5:256>> => {bad_magic, patch(Good, 0, <<"KVX">>)},
        <<6:256>> => {bad_save_reason, patch(Good, 5, <<6>>)},
        <<7:256>> => {length_mismatch, patch(Good, 40, <<1:64/little>>)},
        <<8:256>> => {section_overrun, patch(Good, 48, <<79:64/little>>)},
        <<9:256>> => {truncated, patch(Good, 48, <<-1:64/little>>)}
    },
    _ = [ok = file:write_file(path(Root, K), File) || {K, {_, File}} <- maps:to_list(Damaged)],
    %% Somebody may be copying them in.
    with_store(#{root => Root}, fun(Store) ->
        ?assertMatch(#{files := 9}, erllama_cache_store:info(Store)),
        ?assertEqual(10, length(list_dir(Root)))
    end),
    LongAgo = {{2020, 1, 1}, {0, 0, 0}},
    _ = [ok = file:change_time(path(Root, K), LongAgo) || K <- maps:keys(Damaged)],
    Events = logged(fun() ->
        with_store(#{root => Root}, fun(Store) ->
            ?assertMatch(#{files := 1}, erllama_cache_store:info(Store))
        end)
    end),
    ?assertEqual([filename:basename(path(Root, Key))], list_dir(Root)),
    Expected = [{path(Root, K), Reason} || {K, {Reason, _}} <- maps:to_list(Damaged)],
    Removed = [
        {File, Reason}
     || #{event := corrupt_file_removed, file := File, reason := Reason} <- Events
    ],
    ?assertEqual(lists:sort(Expected), lists:sort(Removed)).

a_start_keeps_later_versions(Root) ->
    Key = with_store(#{root => Root}, fun(Store) -> save(Store, 1) end),
    patch_file(path(Root, Key), 3, <<2>>),
    with_store(#{root => Root}, fun(Store) ->
        ?assertMatch(#{files := 1}, erllama_cache_store:info(Store)),
        ?assert(filelib:is_regular(path(Root, Key))),
        ?assertEqual({error, {corrupt, unsupported_version}}, erllama_cache_store:load(Store, Key))
    end).

a_start_leaves_other_names_alone(Root) ->
    Hex = lists:duplicate(64, $a),
    Random = lists:duplicate(16, $0),
    Names = [
        "notes.txt", "a.kvc", "a.tmp", ".kvc", Hex, Hex ++ ".kvc.tmp", Hex ++ ".kvc~",
        Hex ++ "a.kvc", tl(Hex) ++ ".kvc", [$g | tl(Hex)] ++ ".kvc",
        string:uppercase(Hex) ++ ".kvc",
        Hex ++ "." ++ tl(Random) ++ ".tmp", Hex ++ "." ++ Random ++ "0.tmp",
        Hex ++ "." ++ [$G | tl(Random)] ++ ".tmp", Hex ++ "." ++ Random, Hex ++ ".tmp"
    ],
    _ = [ok = file:write_file(filename:join(Root, Name), <<"x">>) || Name <- Names],
    with_store(#{root => Root, max_bytes => 1}, fun(Store) ->
        ?assertMatch(#{files := 0, bytes := 0}, erllama_cache_store:info(Store)),
        ?assertEqual(lists:sort(Names), list_dir(Root))
    end).

a_start_leaves_what_is_no_file_alone(Root) ->
    {Dir, Fifo, Link} = {<<1:256>>, <<2:256>>, <<3:256>>},
    ok = file:make_dir(path(Root, Dir)),
    [] = os:cmd("mkfifo " ++ path(Root, Fifo)),
    ok = file:make_symlink("/dev/zero", path(Root, Link)),
    TmpDir = filename:join(Root, lists:duplicate(64, $a) ++ ".0123456789abcdef.tmp"),
    ok = file:make_dir(TmpDir),
    There = list_dir(Root),
    Events = logged(fun() ->
        with_store(#{root => Root}, fun(Store) ->
            ?assertMatch(#{files := 0}, erllama_cache_store:info(Store)),
            NotRegular = {error, {corrupt, not_regular}},
            _ = [
                ?assertEqual(NotRegular, erllama_cache_store:load(Store, Key))
             || Key <- [Dir, Fifo, Link]
            ]
        end)
    end),
    ?assertEqual(There, list_dir(Root)),
    Skipped = [File || #{event := file_skipped, file := File} <- Events],
    ?assertEqual(
        lists:sort([temporary_file | [path(Root, Key) || Key <- [Dir, Fifo, Link]]]),
        lists:sort(Skipped)
    ).

%% Root reads everything: it does this on a node that has laid that right down.
an_unreadable_file_is_not_corrupt(Root) ->
    {0, Id} = erllama_cache_test_util:run_command("id", ["-u"]),
    Without = ["--bounding-set=-dac_override,-dac_read_search"],
    {Command, Args} =
        case string:trim(Id) of
            "0" -> {"setpriv", Without ++ ["erl"]};
            _ -> {"erl", []}
        end,
    {ok, Peer, _} = peer:start_link(#{
        connection => standard_io,
        exec => {os:find_executable(Command), Args},
        args => ["-pa" | code:get_path()]
    }),
    ok = peer:call(Peer, ?MODULE, unreadable_file, [Root], 20000),
    ok = peer:stop(Peer).

unreadable_file(Root) ->
    {ok, _} = erllama_cache_writer:start_link(#{host => erllama_cache_store}),
    Key = with_store(#{root => Root}, fun(Store) -> save(Store, 1) end),
    Path = path(Root, Key),
    ok = file:change_mode(Path, 0),
    ?assertEqual({error, eacces}, file:read_file(Path)),
    with_store(#{root => Root}, fun(Store) ->
        ?assert(filelib:is_regular(Path)),
        ?assertEqual({error, eacces}, erllama_cache_store:load(Store, Key)),
        %% It takes its room, as any other.
        Size = filelib:file_size(Path),
        ?assertMatch(#{files := 1, bytes := Size, refused := 0}, erllama_cache_store:info(Store))
    end),
    ok = gen_server:stop(erllama_cache_writer).

a_start_sweeps_what_nobody_writes(Root) ->
    Hex = lists:duplicate(64, $a),
    [Stale, Locked] = [filename:join(Root, Hex ++ "." ++ lists:duplicate(16, C) ++ ".tmp")
                       || C <- "0f"],
    _ = [ok = file:write_file(File, <<"half a f">>) || File <- [Stale, Locked]],
    Lock = lock(Locked),
    with_store(#{root => Root}, fun(_Store) -> ok end),
    ?assertEqual([filename:basename(Locked)], list_dir(Root)),
    ok = unlock(Lock),
    with_store(#{root => Root}, fun(_Store) -> ok end),
    ?assertEqual([], list_dir(Root)).

%% Another operating system process locks a file, until it is told to end.
lock(File) ->
    Script =
        "import fcntl, sys\n"
        "file = open(sys.argv[1])\n"
        "fcntl.flock(file, fcntl.LOCK_EX)\n"
        "print('locked', flush=True)\n"
        "sys.stdin.read(1)\n",
    Port = open_port({spawn_executable, os:find_executable("python3")}, [
        {args, ["-c", Script, File]}, {line, 80}, exit_status
    ]),
    receive
        {Port, {data, {eol, "locked"}}} -> Port
    after 10000 ->
        error(no_lock)
    end.

unlock(Port) ->
    true = port_command(Port, "x"),
    receive
        {Port, {exit_status, 0}} -> ok
    after 10000 ->
        error(still_locked)
    end.

%%% Damage

damage_is_found_by_a_load(Root) ->
    with_store(#{root => Root}, fun(Store) ->
        %% Bigger than one piece of a read, so that no first read finds it all.
        Payload = rand:bytes(300_000),
        Meta = (meta(1))#{prompt_text => <<"prompt">>, hostname => <<>>, erllama_version => <<>>},
        {ok, Key} = erllama_cache_writer:save(Store, disk, Meta, Payload),
        Path = path(Root, Key),
        {ok, Good} = file:read_file(Path),
        Size = byte_size(Good),
        Prompt = 72,
        Tlv = 82,
        Digest = Size - byte_size(Payload) - 32,
        %% Before the digest's record of 38 bytes.
        Tokens = Size - byte_size(Payload) - 38 - 4,
        Damaged = [
            {truncated, <<>>},
            {truncated, binary:part(Good, 0, 10)},
            {truncated, binary:part(Good, 0, Size - 1)},
            {trailing_bytes, <<Good/binary, 0>>},
            {bad_magic, patch(Good, 0, <<0>>)},
            {unsupported_version, patch(Good, 3, <<2>>)},
            {bad_save_reason, patch(Good, 5, <<255>>)},
            {token_count_mismatch, patch(Good, 8, <<16#ffffffff:32/little>>)},
            {length_mismatch, patch(Good, 40, <<-1:64>>)},
            {truncated, patch(patch(Good, 40, <<-1:64>>), 56, <<-1:64>>)},
            {truncated, patch(patch(Good, 40, <<1:64>>), 56, <<1:64>>)},
            {truncated, patch(Good, 48, <<-1:64>>)},
            {section_overrun, patch(Good, Prompt, <<-1:32>>)},
            {section_overrun, patch(Good, Tlv, <<-1:32>>)},
            {section_gap, patch(Good, Tlv, <<0:32>>)},
            {bad_tlv, patch(Good, Tlv + 5, <<-1:32>>)},
            {missing_tag, patch(Good, Tlv + 4, <<16#7f>>)},
            {digest_mismatch, patch(Good, 64, <<(binary:at(Good, 64) bxor 1)>>)},
            {digest_mismatch, flip(Good, Size - 1)},
            {digest_mismatch, flip(Good, 4)},
            {digest_mismatch, flip(Good, Digest)},
            {bad_tag, patch(Good, Digest - 1, <<7>>)},
            {key_mismatch, flip(Good, Tokens)},
            {key_mismatch, flip(Good, Tlv + 9)}
        ],
        _ = [
            begin
                ok = file:write_file(Path, File),
                ?assertEqual(
                    {error, {corrupt, Reason}}, erllama_cache_store:load(Store, Key)
                )
            end
         || {Reason, File} <- Damaged
        ],
        Refused = length(Damaged),
        ?assertMatch(#{files := 1, refused := Refused}, erllama_cache_store:info(Store)),
        ok = file:write_file(Path, Good),
        ?assertMatch({ok, _, Payload}, erllama_cache_store:load(Store, Key))
    end).

a_corrupt_file_is_replaced_by_a_save(Root) ->
    with_store(#{root => Root}, fun(Store) ->
        Key = save(Store, 1),
        _ = [
            begin
                Damage(path(Root, Key)),
                {error, {corrupt, _}} = erllama_cache_store:load(Store, Key),
                ?assertEqual(Key, save(Store, 1, <<"new">>)),
                ?assertMatch({ok, _, <<"new">>}, erllama_cache_store:load(Store, Key)),
                ?assertEqual([filename:basename(path(Root, Key))], list_dir(Root))
            end
         || Damage <- [
                fun corrupt_payload/1,
                fun(Path) -> ok = file:write_file(Path, <<>>) end,
                fun(Path) -> patch_file(Path, 48, <<-1:64>>) end
            ]
        ],
        ?assertMatch(#{files := 1}, erllama_cache_store:info(Store))
    end).

a_corrupt_file_can_be_deleted(Root) ->
    with_store(#{root => Root}, fun(Store) ->
        Key = save(Store, 1),
        corrupt_payload(path(Root, Key)),
        {error, {corrupt, _}} = erllama_cache_store:load(Store, Key),
        ?assertEqual(ok, erllama_cache_store:delete(Store, Key)),
        ?assertEqual([], list_dir(Root))
    end).

%% Neither by a load, for which the right file in the wrong place is no file of this root, nor by a
%% save, which takes the link's place.
a_link_is_not_followed(Root) ->
    Elsewhere = filename:join(Root, "elsewhere"),
    with_store(#{root => Root}, fun(Store) ->
        Key = save(Store, 1, <<"old">>),
        ok = file:rename(path(Root, Key), Elsewhere),
        ok = file:make_symlink(Elsewhere, path(Root, Key)),
        {ok, Old} = file:read_file(Elsewhere),
        ?assertEqual({error, {corrupt, not_regular}}, erllama_cache_store:load(Store, Key)),
        ?assertEqual(Key, save(Store, 1, <<"new">>)),
        ?assertMatch({ok, #file_info{type = regular}}, file:read_link_info(path(Root, Key))),
        ?assertMatch({ok, _, <<"new">>}, erllama_cache_store:load(Store, Key)),
        ?assertEqual({ok, Old}, file:read_file(Elsewhere))
    end).

a_directory_in_the_way_is_an_error(Root) ->
    with_store(#{root => Root}, fun(Store) ->
        ok = file:make_dir(path(Root, key(1))),
        ?assertEqual(
            {error, eisdir}, erllama_cache_writer:save(Store, disk, meta(1), ?PAYLOAD)
        ),
        ?assertMatch({error, _}, erllama_cache_store:delete(Store, key(1))),
        ?assertEqual([filename:basename(path(Root, key(1)))], list_dir(Root)),
        ?assertMatch(#{files := 0, reservations := 0}, erllama_cache_store:info(Store))
    end).

a_root_that_is_gone_is_an_error(Root) ->
    Gone = filename:join(Root, "gone"),
    ok = file:make_dir(Gone),
    with_store(#{root => Gone}, fun(Store) ->
        Key = save(Store, 1),
        ok = file:del_dir_r(Gone),
        ?assertEqual({error, enoent}, erllama_cache_store:load(Store, Key)),
        ?assertEqual({error, enoent}, erllama_cache_store:delete(Store, Key)),
        [
            ?assertEqual(
                {error, enoent}, erllama_cache_writer:save(Store, disk, meta(N), ?PAYLOAD)
            )
         || N <- [1, 2]
        ],
        ?assertMatch(#{reservations := 0}, erllama_cache_store:info(Store)),
        ?assertEqual(0, erllama_cache_writer:current())
    end).

%%% The application

starts_nothing_without_stores(_Root) ->
    ok = application:start(erllama_cache_nif),
    ?assertEqual([], supervisor:which_children(erllama_cache_nif_sup)),
    ?assertEqual(undefined, whereis(erllama_cache_writer)).

starts_the_stores_of_its_environment(Root) ->
    set_env(#{
        stores => [{store_a, #{root => Root}}, {store_b, #{root => Root, tier => ram_file}}],
        max_concurrent => 3, file_mode => 8#640
    }),
    ok = application:start(erllama_cache_nif),
    ?assertEqual(3, erllama_cache_writer:max_concurrent()),
    Key = save(store_a, 1),
    ?assertEqual(8#640, mode(path(Root, Key))),
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

%% Each comes back, however often it is killed, and no other is any the worse for it.
whoever_is_killed_comes_back_alone(Root) ->
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
            ?assertEqual(Others, [{Name, whereis(Name)} || {Name, _} <- Others])
        end
     || Find <- [fun erlang:whereis/1, Keeper], Id <- Names, _ <- lists:seq(1, 15)
    ],
    [
        begin
            eventually(fun() -> erllama_cache_store:is_store(Store) end),
            ?assertMatch({ok, _}, erllama_cache_writer:save(Store, disk, meta(1), ?PAYLOAD))
        end
     || Store <- [store_a, store_b]
    ],
    %% A root that is away.
    ok = file:rename(A, A ++ ".away"),
    kill(whereis(store_a)),
    kill(whereis(store_b)),
    eventually(fun() -> erllama_cache_store:is_store(store_b) end),
    ?assertMatch({ok, _, ?PAYLOAD}, erllama_cache_store:load(store_b, key(1))),
    ?assertExit({noproc, _}, erllama_cache_store:load(store_a, key(1))),
    ok = file:rename(A ++ ".away", A),
    %% The pauses between the tries have grown.
    erllama_cache_test_util:eventually(fun() -> erllama_cache_store:is_store(store_a) end, 60000),
    ?assertMatch({ok, _, ?PAYLOAD}, erllama_cache_store:load(store_a, key(1))).

%% A node that runs erllama may have stores as well: its writer serves both.
in_a_node_with_erllama_the_writer_is_erllamas(Root) ->
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

a_configuration_that_is_none_is_named(Root) ->
    [
        begin
            set_env(#{stores => Stores}),
            {error, Reason} = application:start(erllama_cache_nif),
            Said = lists:flatten(io_lib:format("~0p", [Reason])),
            ?assertEqual({Expected, true}, {Expected, string:find(Said, Expected) =/= nomatch}),
            ?assertEqual(undefined, whereis(erllama_cache_nif_sup))
        end
     || {Stores, Expected} <- [
            {[{store_a, [{root, Root}]}], "{invalid_config,stores,{store_a"},
            {store_a, "{invalid_config,stores,store_a}"},
            {[{store_a, #{root => Root, tier => ram}}], "{invalid_option,tier,ram}"},
            {[{store_a, #{}}], "{missing_option,root}"}
        ]
    ].

a_name_of_anothers_table_is_refused(Root) ->
    process_flag(trap_exit, true),
    Table = ets:new(?STORE, [named_table]),
    ?assertEqual(
        {error, {name_taken, ?STORE}}, erllama_cache_store:start_link(?STORE, #{root => Root})
    ),
    ?assertNot(erllama_cache_store:is_store(?STORE)),
    true = ets:delete(Table).

a_store_that_cannot_start_stops_the_start(Root) ->
    set_env(#{stores => [{store_a, #{root => filename:join(Root, "missing")}}]}),
    {error, Reason} = application:start(erllama_cache_nif),
    ?assertNotEqual(nomatch, string:find(io_lib:format("~p", [Reason]), "enoent")),
    ?assertEqual(undefined, whereis(erllama_cache_writer)).

%% It goes with the application when that is unloaded.
set_env(Env) ->
    _ = [ok = application:set_env(erllama_cache_nif, Key, Value)
         || {Key, Value} <- maps:to_list(Env)],
    ok.

%%% Two nodes

%% Both save the same keys at once, with payloads of their own. Each save succeeds in each node, and
%% both nodes see one payload.
two_nodes_save_the_same_keys(Root) ->
    Nodes = [a, b],
    Peers = [{Node, start_peer()} || Node <- Nodes],
    _ = [ok = call(Peer, start_in_node, [?STORE, Root]) || {_, Peer} <- Peers],
    Numbers = lists:seq(1, 40),
    Saved = in_processes(length(Peers), fun(N) ->
        {Node, Peer} = lists:nth(N, Peers),
        call(Peer, save_in_node, [?STORE, Node, Numbers])
    end),
    _ = [
        ?assert(Result =:= {ok, key(N)} orelse Result =:= {error, already_present})
     || Results <- Saved, {N, Result} <- lists:zip(Numbers, Results)
    ],
    [InA, InB] = [call(Peer, load_in_node, [?STORE, Numbers]) || {_, Peer} <- Peers],
    ?assertEqual(InA, InB),
    _ = [
        ?assert(lists:member(Payload, [node_payload(Node, N) || Node <- Nodes]))
     || {N, {ok, Payload}} <- lists:zip(Numbers, InA)
    ],
    _ = [ok = peer:stop(Peer) || {_, Peer} <- Peers],
    ?assertEqual(lists:sort([filename:basename(path(Root, key(N))) || N <- Numbers]),
                 list_dir(Root)).

start_peer() ->
    {ok, Peer, _Node} = peer:start_link(#{connection => standard_io, args => code_path()}),
    Peer.

%% Of a module that cover has compiled nobody knows where it is; erllama_cache_nif it may not
%% compile.
code_path() ->
    Dirs = lists:usort([filename:dirname(filename:absname(code:which(Module)))
                        || Module <- [?MODULE, erllama_cache_nif]]),
    lists:append([["-pa", Dir] || Dir <- Dirs]).

call(Peer, Function, Args) ->
    peer:call(Peer, ?MODULE, Function, Args, 50000).

%% Nobody there stays to be linked to.
start_in_node(Store, Root) ->
    {ok, Server} = erllama_cache_store:start_link(Store, #{root => Root}),
    {ok, Writer} = erllama_cache_writer:start_link(#{host => erllama_cache_store}),
    _ = [unlink(Pid) || Pid <- [Server, Writer]],
    ok.

save_in_node(Store, Node, Numbers) ->
    [erllama_cache_writer:save(Store, disk, meta(N), node_payload(Node, N)) || N <- Numbers].

load_in_node(Store, Numbers) ->
    [
        case erllama_cache_store:load(Store, key(N)) of
            {ok, _Info, Payload} -> {ok, Payload};
            Other -> Other
        end
     || N <- Numbers
    ].

node_payload(Node, N) ->
    binary:copy(atom_to_binary(Node), 1000 + N).

%%% Helpers

with_store(Options, Fun) ->
    with_store(?STORE, Options, Fun).

with_store(Name, Options, Fun) ->
    {ok, Pid} = erllama_cache_store:start_link(Name, Options),
    try
        Result = Fun(Name),
        ok = its_books_balance(Name, Options),
        Result
    after
        ok = gen_server:stop(Pid)
    end.

%% Whatever was done to a store: what it counts is what is there, and it watches over nobody when
%% nothing is reserved.
its_books_balance(Name, Options) ->
    #{used := Used, should := Should} = gen_server:call(Name, audit),
    is_integer(maps:get(max_bytes, Options, infinity)) andalso ?assertEqual(Should, Used),
    case erllama_cache_store:info(Name) of
        #{reservations := 0} -> eventually(fun() -> watches(Name) =:= 0 end);
        #{} -> ok
    end.

%% Two stores on one root, as two nodes have them.
with_two_stores(Root, Fun) ->
    with_store(#{root => Root}, fun(Store) ->
        with_store(other_store, #{root => Root}, fun(Other) -> Fun(Store, Other) end)
    end).

meta(N) ->
    #{
        save_reason => cold, quant_bits => 16, fingerprint => <<1:256>>, fingerprint_mode => safe,
        quant_type => f16, ctx_params_hash => <<2:256>>, tokens => [N], context_size => 4096
    }.

key(N) ->
    {ok, Key} = erllama_cache_store:key(meta(N)),
    Key.

save(Store, N) ->
    save(Store, N, ?PAYLOAD).

save(Store, N, Payload) ->
    {ok, Key} = erllama_cache_writer:save(Store, disk, meta(N), Payload),
    Key.

reserve(Store, Key) ->
    erllama_cache_store:reserve(Store, disk, Key, 1000).

path(Root, Key) ->
    erllama_cache_path:final(Root, Key).

list_dir(Root) ->
    {ok, Names} = file:list_dir(Root),
    lists:sort(Names).

mode(Path) ->
    {ok, #file_info{mode = Mode}} = file:read_file_info(Path),
    Mode band 8#777.

corrupt_payload(Path) ->
    {ok, File} = file:read_file(Path),
    ok = file:write_file(Path, flip(File, byte_size(File) - 1)).

patch_file(Path, Offset, Bytes) ->
    {ok, File} = file:read_file(Path),
    ok = file:write_file(Path, patch(File, Offset, Bytes)).

patch(File, Offset, Bytes) ->
    Size = byte_size(Bytes),
    <<Before:Offset/binary, _:Size/binary, After/binary>> = File,
    <<Before/binary, Bytes/binary, After/binary>>.

flip(File, Offset) ->
    patch(File, Offset, <<(binary:at(File, Offset) bxor 1)>>).

%% What a function returns in a process of its own, which is dead by then.
in_process(Fun) ->
    [Result] = in_processes(1, fun(_) -> Fun() end),
    Result.

%% They all begin before the first one is waited for.
in_processes(Count, Fun) ->
    Started = [spawn_monitor(fun() -> exit({result, Fun(N)}) end) || N <- lists:seq(1, Count)],
    [
        receive
            {'DOWN', Monitor, process, Pid, {result, Result}} -> Result;
            {'DOWN', Monitor, process, Pid, Reason} -> error(Reason)
        end
     || {Pid, Monitor} <- Started
    ].

%% A process that lives on and does what it is asked, with its first answer.
start_owner(Fun) ->
    Owner = spawn(fun owner/0),
    {Owner, ask(Owner, Fun)}.

owner() ->
    receive
        {From, Ref, Fun} -> From ! {Ref, Fun()}
    end,
    owner().

ask(Owner, Fun) ->
    Ref = make_ref(),
    Owner ! {self(), Ref, Fun},
    receive
        {Ref, Result} -> Result
    after 5000 ->
        error(no_answer)
    end.

%% Waits until the server has heard of every death and has done with it.
none_reserved(Store) ->
    eventually(fun() -> maps:get(reservations, erllama_cache_store:info(Store)) =:= 0 end),
    _ = sys:get_state(Store),
    ok.

kill(Pid) ->
    Monitor = monitor(process, Pid),
    exit(Pid, kill),
    receive
        {'DOWN', Monitor, process, Pid, _} -> ok
    end.

eventually(Fun) ->
    eventually(Fun, erlang:monotonic_time(millisecond) + 30000).

eventually(Fun, Deadline) ->
    case Fun() of
        true ->
            ok;
        false ->
            ?assert(erlang:monotonic_time(millisecond) < Deadline),
            receive
            after 5 -> eventually(Fun, Deadline)
            end
    end.

%% The reports that are logged while a function runs.
logged(Fun) ->
    ok = logger:add_handler(?MODULE, ?MODULE, #{config => #{pid => self()}}),
    try
        Fun()
    after
        ok = logger:remove_handler(?MODULE)
    end,
    reports().

reports() ->
    receive
        {?MODULE, Report} -> [Report | reports()]
    after 0 ->
        []
    end.

log(#{msg := {report, Report}, meta := #{application := erllama_cache_nif}},
    #{config := #{pid := Pid}}) ->
    Pid ! {?MODULE, Report};
log(_Event, _Config) ->
    ok.
