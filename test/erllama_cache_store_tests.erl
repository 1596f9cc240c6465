%% The built-in store: its options, saves and loads through it, and its figures. Its reservations
%% are in erllama_cache_index_tests, its start on a directory in erllama_cache_store_scan_tests.
-module(erllama_cache_store_tests).

-include("erllama_cache_store_util.hrl").
-include_lib("eunit/include/eunit.hrl").

-import(erllama_cache_store_util, [
    bytes_in/1, corrupt_payload/1, in_process/1, is_known/2, meta/1, reserve/2, save/3,
    with_store/2, with_store/3, with_two_stores/2, save/2
]).
-import(erllama_cache_test_util, [file_of/2, files/1, mode/1, eventually/1, run_command/2]).

store_test_() ->
    erllama_cache_store_util:store_tests([
        fun starts_with_any_kind_of_path/1,
        fun a_relative_root_stays_where_it_is/1,
        fun invalid_roots_are_refused/1,
        fun unknown_and_invalid_options_are_refused/1,
        fun a_name_is_taken_once/1,
        fun the_name_of_a_foreign_table_is_refused/1,
        fun child_spec_starts_a_store/1,
        fun a_root_is_made_if_wanted/1,
        fun a_store_saves_in_its_tier/1,
        fun member_says_whether_there_is_a_file/1,
        fun info_of_a_key_is_what_its_file_says/1,
        fun fold_visits_each_file/1,
        fun two_stores_are_independent/1,
        fun a_store_has_one_tier/1,
        fun without_a_store_calls_exit/1,
        fun a_save_is_loaded/1,
        fun a_save_in_many_slices_is_loaded/1,
        fun key_is_that_of_a_save/1,
        fun key_needs_only_the_fields_that_it_hashes/1,
        fun a_quant_type_without_a_byte_is_refused/1,
        fun a_file_has_the_permissions_of_the_configuration/1,
        fun a_load_is_noted_in_the_file/1,
        fun a_last_use_in_the_future_is_corrected/1,
        fun loads_change_nothing_while_no_note_is_due/1,
        fun a_load_of_a_missing_file_is_a_miss/1,
        fun delete_removes_the_file/1,
        fun a_second_save_is_already_present/1,
        fun bad_meta_leaves_nothing/1,
        fun info_counts/1,
        fun loads_and_saves_need_no_server/1,
        fun a_load_finds_what_another_node_saved/1,
        fun a_save_adopts_what_another_node_saved/1
    ]).

%%% Its own names for what the writer does, and what it has

a_root_is_made_if_wanted(Root) ->
    process_flag(trap_exit, true),
    New = filename:join([Root, "a", "b"]),
    ?assertEqual({error, enoent}, erllama_cache_store:start_link(?STORE, [{root, New}])),
    {ok, Store} = erllama_cache_store:start_link(?STORE, [{root, New}, {create, true}]),
    ?assertEqual(8#700, mode(New)),
    ok = gen_server:stop(Store),
    ok = file:change_mode(New, 8#750),
    with_store(#{root => New, create => true}, fun(_) -> ?assertEqual(8#750, mode(New)) end),
    File = filename:join(Root, "file"),
    ok = file:write_file(File, <<>>),
    Options = #{root => File, create => true},
    ?assertMatch({error, _}, erllama_cache_store:start_link(?STORE, Options)).

a_store_saves_in_its_tier(Root) ->
    with_store(#{root => Root, tier => ram_file}, fun(_) ->
        {ok, Key} = erllama_cache_store:save(?STORE, meta(1), ?PAYLOAD),
        ?assertMatch({ok, _, ?PAYLOAD}, erllama_cache_store:load(?STORE, Key)),
        ?assertMatch({ok, _}, erllama_cache_store:save(?STORE, meta(2), ?PAYLOAD, 5000)),
        {ok, Ref} = erllama_cache_store:save_async(?STORE, meta(3), ?PAYLOAD),
        receive {erllama_cache_writer, Ref, First} -> ?assertMatch({ok, _}, First) end,
        Options = #{timeout => 5000},
        {ok, Other} = erllama_cache_store:save_async(?STORE, meta(3), ?PAYLOAD, Options),
        receive
            {erllama_cache_writer, Other, Then} -> ?assertEqual({error, already_present}, Then)
        end
    end).

member_says_whether_there_is_a_file(Root) ->
    with_store(#{root => Root}, fun(_) ->
        {ok, Key} = erllama_cache_store:key(meta(1)),
        ?assertNot(erllama_cache_store:member(?STORE, Key)),
        Key = save(?STORE, 1),
        ?assert(erllama_cache_store:member(?STORE, Key)),
        %% As another node does.
        {ok, Bytes} = file:read_file(file_of(Root, Key)),
        ok = erllama_cache_store:delete(?STORE, Key),
        ?assertNot(erllama_cache_store:member(?STORE, Key)),
        ok = file:write_file(file_of(Root, Key), Bytes),
        ?assert(erllama_cache_store:member(?STORE, Key))
    end).

info_of_a_key_is_what_its_file_says(Root) ->
    with_store(#{root => Root}, fun(_) ->
        Key = save(?STORE, 1),
        {ok, Info, _} = erllama_cache_store:load(?STORE, Key),
        ?assertEqual({ok, Info}, erllama_cache_store:info(?STORE, Key)),
        ?assertEqual(miss, erllama_cache_store:info(?STORE, <<1:256>>)),
        ok = file:write_file(file_of(Root, Key), <<"not a state">>),
        ?assertMatch({error, {corrupt, _}}, erllama_cache_store:info(?STORE, Key))
    end).

fold_visits_each_file(Root) ->
    with_store(#{root => Root}, fun(_) ->
        Keys = [save(?STORE, N) || N <- [1, 2, 3]],
        {ok, Reserved} = erllama_cache_store:key(meta(4)),
        {ok, Token} = reserve(?STORE, Reserved),
        Fold = fun(Key, #{size := Size, last_used := Used}, Sofar) ->
            [{Key, Size, Used} | Sofar]
        end,
        Visited = erllama_cache_store:fold(?STORE, Fold, []),
        ?assertEqual(lists:sort(Keys), lists:sort([Key || {Key, _, _} <- Visited])),
        ?assertEqual(lists:sum([Size || {_, Size, _} <- Visited]), bytes_in(Root)),
        %% Once, whatever it raises.
        Raises = fun(_, _, _) ->
            self() ! folded,
            error(badarg)
        end,
        ?assertError(badarg, erllama_cache_store:fold(?STORE, Raises, none)),
        receive folded -> ok end,
        receive folded -> error(folded_again) after 0 -> ok end,
        Now = erlang:system_time(millisecond),
        ok = erllama_cache_store:cancel(?STORE, Reserved, Token),
        ?assert(lists:all(fun({_, _, Used}) -> abs(Now - Used) < 60000 end, Visited))
    end).

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
            ?assertEqual([filename:basename(file_of(Here, Key))], files(filename:join(Here, "kv"))),
            ?assertMatch(#{files := 1}, erllama_cache_store:info(Store))
        end),
        {ok, Restarted} = apply(Module, Function, Args),
        ?assertMatch(#{files := 1}, erllama_cache_store:info(?STORE)),
        ok = gen_server:stop(Restarted)
    after
        ok = file:set_cwd(Before)
    end.

invalid_roots_are_refused(Root) ->
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

unknown_and_invalid_options_are_refused(Root) ->
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

the_name_of_a_foreign_table_is_refused(Root) ->
    process_flag(trap_exit, true),
    Table = ets:new(?STORE, [named_table]),
    ?assertEqual(
        {error, {name_taken, ?STORE}}, erllama_cache_store:start_link(?STORE, #{root => Root})
    ),
    ?assertEqual(error, erllama_cache_store_lookup:keyed_by(?STORE)),
    true = ets:delete(Table).

child_spec_starts_a_store(Root) ->
    Specs = [
        erllama_cache_store:child_spec(one, #{root => Root}),
        erllama_cache_store:child_spec([{name, two}, {root, Root}])
    ],
    ?assertEqual(hd(Specs), erllama_cache_store:child_spec(#{name => one, root => Root})),
    ?assertEqual(ok, supervisor:check_childspecs(Specs)),
    [#{start := {Module, Function, Args}} | _] = Specs,
    {ok, Pid} = apply(Module, Function, Args),
    ?assertEqual(Pid, whereis(one)),
    ok = gen_server:stop(Pid).

two_stores_are_independent(Root) ->
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
            version => 1, quant_byte => 7,
            tokens := <<1:32/little, 0:32, -1:32, 2:32/little, -1:32>>,
            file_size => filelib:file_size(file_of(Root, Key))
        },
        ?assertEqual(Stored, Info),
        ?assertEqual([filename:basename(file_of(Root, Key))], files(Root))
    end).

%% 128 MiB are more than one slice of 20 ms writes or reads on anything but the fastest machine.
a_save_in_many_slices_is_loaded(Root) ->
    with_store(#{root => Root}, fun(Store) ->
        Payload = binary:copy(rand:bytes(1 bsl 20), 128),
        Key = save(Store, 1, Payload),
        {ok, #{file_size := Size}, Loaded} = erllama_cache_store:load(Store, Key),
        ?assert(Loaded =:= Payload),
        ?assertEqual(Size, filelib:file_size(file_of(Root, Key)))
    end).

key_is_that_of_a_save(Root) ->
    with_store(#{root => Root}, fun(Store) ->
        #{fingerprint := Fingerprint, ctx_params_hash := CtxParamsHash} = meta(5),
        Hash = fun(Tokens) ->
            crypto:hash(sha256, [Fingerprint, 7, CtxParamsHash, [<<T:32/little>> || T <- Tokens]])
        end,
        Expected = Hash([5]),
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
        ?assertEqual({ok, Hash(Many)}, erllama_cache_store:key((meta(5))#{tokens => Many})),
        ?assertEqual(
            {error, {invalid_meta, tokens}},
            erllama_cache_store:key((meta(5))#{tokens => Many ++ [1.0]})
        )
    end).

key_needs_only_the_fields_that_it_hashes(Root) ->
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
        ?assertEqual([], files(Root)),
        ?assertMatch(#{reservations := 0}, erllama_cache_store:info(Store))
    end).

a_file_has_the_permissions_of_the_configuration(Root) ->
    with_store(#{root => Root}, fun(Store) ->
        ?assertEqual(8#600, mode(file_of(Root, save(Store, 1)))),
        ok = gen_server:stop(erllama_cache_writer),
        {ok, Writer} = erllama_cache_writer:start_link(
            #{host => erllama_cache_store, file_mode => 8#664}
        ),
        %% The fixture stops it, in a process that outlives this one.
        true = unlink(Writer),
        ?assertEqual(8#664, mode(file_of(Root, save(Store, 2))))
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
        ok = eventually(fun() ->
            {ok, #{last_used_time := Used}, ?PAYLOAD} = erllama_cache_store:load(Store, Key),
            Used >= Before
        end),
        {ok, #{hit_count := Hits}, _} = erllama_cache_store:load(Store, Key),
        ?assert(Hits >= 6),
        {ok, File} = file:read_file(file_of(Root, Key)),
        [{ok, _, _} = erllama_cache_store:load(Store, Key) || _ <- lists:seq(1, 100)],
        ?assertEqual({ok, File}, file:read_file(file_of(Root, Key)))
    end).

%% A clock was ahead: the file would be taken for just used at each start until it is that late.
a_last_use_in_the_future_is_corrected(Root) ->
    with_store(#{root => Root}, fun(Store) ->
        Meta = (meta(1))#{last_used_time => erlang:system_time(second) + 365 * 86400},
        {ok, Key} = erllama_cache_writer:save(Store, disk, Meta, ?PAYLOAD),
        ok = eventually(fun() ->
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
        Before = content_and_times(file_of(Root, Key)),
        [{ok, _, _} = erllama_cache_store:load(Store, Key) || _ <- lists:seq(1, 100)],
        Due = Save(2, 1000),
        ok = eventually(fun() ->
            {ok, #{hit_count := Hits}, _} = erllama_cache_store:load(Store, Due),
            Hits > 0
        end),
        ?assertEqual(Before, content_and_times(file_of(Root, Key)))
    end).

%% The times when the content and the inode were last changed, to the nanosecond.
content_and_times(File) ->
    {0, Times} = run_command("stat", ["-c", "%y %z", File]),
    {file:read_file(File), Times}.

a_load_of_a_missing_file_is_a_miss(Root) ->
    with_store(#{root => Root}, fun(Store) ->
        ?assertEqual(miss, erllama_cache_store:load(Store, <<0:256>>)),
        Key = save(Store, 1),
        ok = file:delete(file_of(Root, Key)),
        ?assertEqual(miss, erllama_cache_store:load(Store, Key)),
        ?assertMatch(#{files := 0, bytes := 0, misses := 2}, erllama_cache_store:info(Store)),
        ?assertEqual(Key, save(Store, 1)),
        ?assertError(function_clause, erllama_cache_store:load(Store, <<0:248>>))
    end).

delete_removes_the_file(Root) ->
    with_store(#{root => Root}, fun(Store) ->
        Key = save(Store, 1),
        ?assertEqual(ok, erllama_cache_store:delete(Store, Key)),
        ?assertEqual([], files(Root)),
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
        ?assertEqual([], files(Root)),
        ?assertMatch({ok, _}, Save(meta(1)))
    end).

info_counts(Root) ->
    with_store(#{root => Root}, fun(Store) ->
        Key = save(Store, 1),
        _ = save(Store, 2),
        {error, already_present} = erllama_cache_writer:save(Store, disk, meta(1), ?PAYLOAD),
        {ok, _, _} = erllama_cache_store:load(Store, Key),
        miss = erllama_cache_store:load(Store, <<0:256>>),
        corrupt_payload(file_of(Root, Key)),
        {error, _} = erllama_cache_store:load(Store, Key),
        {ok, _} = reserve(Store, <<1:256>>),
        %% The corrupt one takes its room, too.
        Bytes = bytes_in(Root),
        ?assertEqual(
            #{
                name => Store, root => Root, tier => disk, keyed_by => tokens,
                max_bytes => infinity, files => 2,
                bytes => Bytes, reservations => 1, saves => 2, duplicates => 1, hits => 1,
                misses => 1, refused => 1, evictions => 0,
                fetched => 0, fetched_bytes => 0, fetch_failures => 0, expired => 0,
                rejected => 0, pinned => 0
            },
            erllama_cache_store:info(Store)
        )
    end).

loads_and_saves_need_no_server(Root) ->
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
        Size = filelib:file_size(file_of(Root, Key)),
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
        Size = filelib:file_size(file_of(Root, Key)),
        ?assertMatch(#{files := 1, bytes := Size}, erllama_cache_store:info(Store))
    end).
