%% Tag 0xB3: which files get a digest, what it finds, and what a secret does.
-module(erllama_cache_digest_tests).

-include("erllama_cache_store_util.hrl").
-include_lib("eunit/include/eunit.hrl").

-import(erllama_cache_test_util, [each/3, temporary_dir/1, file_of/2, flip/2, eventually/1]).
-import(erllama_cache_store_util, [running/3, start_writer/1]).

-define(WRITER, erllama_cache_writer).
-define(KEY, <<"0123456789abcdef0123456789ABCDEF">>).
-define(OTHER_KEY, <<42:256>>).
-define(TAG, 16#b3).

digest_test_() ->
    each(fun() -> temporary_dir(?MODULE) end, fun file:del_dir_r/1, [
        fun files_on_disk_have_a_digest_and_in_ram_none/1,
        fun the_digest_can_be_configured/1,
        fun the_digest_covers_fields_that_no_checksum_covers/1,
        fun a_noted_use_keeps_the_digest_valid/1,
        fun large_files_have_a_digest/1,
        fun a_keyed_file_is_loaded/1,
        fun a_keyed_file_is_loaded_without_the_secret/1,
        fun an_unauthenticated_file_is_refused/1,
        fun an_unauthenticated_file_is_replaced/1,
        fun a_scan_skips_unauthenticated_files/1,
        fun files_dropped_from_the_page_cache_are_loaded/1
    ]).

files_on_disk_have_a_digest_and_in_ram_none(Root) ->
    running(Root, #{}, fun() -> ?assertMatch({0, _}, digest(Root, save(1))) end),
    ram(Root, #{}, fun() -> ?assertEqual(none, digest(Root, save(ram_file, 2))) end).

the_digest_can_be_configured(Root) ->
    running(Root, #{digest => none}, fun() -> ?assertEqual(none, digest(Root, save(1))) end),
    ram(Root, #{digest => blake3}, fun() ->
        ?assertMatch({0, _}, digest(Root, save(ram_file, 2)))
    end).

the_digest_covers_fields_that_no_checksum_covers(Root) ->
    running(Root, #{}, fun() ->
        Key = save(1),
        {ok, Good} = file:read_file(file_of(Root, Key)),
        %% quant_bits, context_size, creation_time, the prompt's text
        [
            begin
                ok = file:write_file(file_of(Root, Key), flip(Good, At)),
                ?assertEqual({error, {corrupt, digest_mismatch}}, load(Key))
            end
         || At <- [4, 16, 24, 76]
        ],
        %% hit_count and last_used_time are left out: they change.
        [
            begin
                ok = file:write_file(file_of(Root, Key), flip(Good, At)),
                ?assertMatch({ok, _, <<"payload">>}, load(Key))
            end
         || At <- [12, 32]
        ]
    end).

%% A note of use leaves the digest right.
a_noted_use_keeps_the_digest_valid(Root) ->
    running(Root, #{}, fun() ->
        Meta = (meta(1))#{last_used_time => 1000},
        {ok, Key} = ?WRITER:save(?STORE, disk, Meta, <<"payload">>),
        ok = eventually(fun() ->
            {ok, #{hit_count := Hits}, <<"payload">>} = load(Key),
            Hits > 0
        end)
    end).

%% More than one block, the last one not whole: hashed beside the writing and the reading.
large_files_have_a_digest(Root) ->
    running(Root, #{}, fun() ->
        Payload = rand:bytes(9 * 1048576 + 12345),
        {ok, Key} = ?WRITER:save(?STORE, disk, meta(1), Payload),
        ?assertMatch({ok, _, Payload}, load(Key)),
        {ok, Good} = file:read_file(file_of(Root, Key)),
        ?assertMatch({0, _}, digest(Root, Key)),
        ok = file:write_file(file_of(Root, Key), flip(Good, 4)),
        ?assertEqual({error, {corrupt, digest_mismatch}}, load(Key))
    end).

a_keyed_file_is_loaded(Root) ->
    Secret = secret(?KEY),
    running(Root, #{mac_key => Secret}, fun() ->
        Key = save(1),
        ?assertMatch({1, _}, digest(Root, Key)),
        ?assertMatch({ok, _, <<"payload">>}, load(Key))
    end),
    %% It wins over `digest', and over the tier.
    ram(Root, #{mac_key => Secret, digest => none}, fun() ->
        Key = save(ram_file, 2),
        ?assertMatch({1, _}, digest(Root, Key)),
        ?assertMatch({ok, _, <<"payload">>}, load(Key))
    end).

a_keyed_file_is_loaded_without_the_secret(Root) ->
    Key = running(Root, #{mac_key => secret(?KEY)}, fun() -> save(1) end),
    running(Root, #{}, fun() -> ?assertMatch({ok, _, <<"payload">>}, load(Key)) end).

an_unauthenticated_file_is_refused(Root) ->
    Plain = running(Root, #{}, fun() -> save(1) end),
    None = running(Root, #{digest => none}, fun() -> save(2) end),
    Others = running(Root, #{mac_key => secret(?OTHER_KEY)}, fun() -> save(3) end),
    running(Root, #{mac_key => secret(?KEY)}, fun() ->
        [?assertEqual({error, unauthenticated}, load(Key)) || Key <- [Plain, None, Others]],
        Key = save(4),
        {ok, Good} = file:read_file(file_of(Root, Key)),
        %% Whoever rewrites payload and checksum cannot rewrite this.
        [
            begin
                ok = file:write_file(file_of(Root, Key), flip(Good, At)),
                ?assertEqual({error, unauthenticated}, load(Key))
            end
         || At <- [4, 76]
        ],
        ?assertMatch(#{refused := 5}, erllama_cache_store:info(?STORE))
    end).

an_unauthenticated_file_is_replaced(Root) ->
    Key = running(Root, #{}, fun() -> save(1) end),
    running(Root, #{mac_key => secret(?KEY)}, fun() ->
        ?assertEqual({error, unauthenticated}, load(Key)),
        ?assertEqual({ok, Key}, ?WRITER:save(?STORE, disk, meta(1), <<"proven">>)),
        ?assertMatch({ok, _, <<"proven">>}, load(Key))
    end).

a_scan_skips_unauthenticated_files(Root) ->
    Plain = running(Root, #{}, fun() -> save(1) end),
    Keyed = running(Root, #{mac_key => secret(?KEY)}, fun() -> save(2) end),
    running(Root, #{mac_key => secret(?KEY)}, fun() ->
        ?assertMatch(#{files := 2}, erllama_cache_store:info(?STORE)),
        ?assertMatch({ok, _, _}, load(Keyed)),
        ?assertEqual({error, unauthenticated}, load(Plain)),
        %% Left where it is: it may be somebody else's.
        ?assert(filelib:is_regular(file_of(Root, Plain)))
    end),
    %% But it has its room, and is what goes first.
    Bound = filelib:file_size(file_of(Root, Plain)) + filelib:file_size(file_of(Root, Keyed)),
    ok = file:change_time(file_of(Root, Plain), {{2020, 1, 1}, {0, 0, 0}}),
    running(Root, #{mac_key => secret(?KEY), max_bytes => Bound}, fun() ->
        _ = save(3),
        ?assertNot(filelib:is_file(file_of(Root, Plain)))
    end).

secret(Key) -> fun() -> Key end.

files_dropped_from_the_page_cache_are_loaded(Root) ->
    running(Root, #{page_cache => drop}, fun() ->
        Payload = rand:bytes(2 * 1048576),
        {ok, Key} = ?WRITER:save(?STORE, disk, meta(1), Payload),
        ?assertMatch({ok, _, Payload}, load(Key))
    end),
    ?assertError({invalid_config, page_cache, sometimes}, start_writer(#{page_cache => sometimes})).

%%% Helpers

ram(Root, Config, Fun) ->
    running(Root, Config#{tier => ram_file}, Fun).

meta(N) ->
    (erllama_cache_test_util:meta([N, 2, 3]))#{prompt_text => <<"prompt">>}.

save(N) ->
    save(disk, N).

save(Tier, N) ->
    {ok, Key} = ?WRITER:save(?STORE, Tier, meta(N), <<"payload">>),
    Key.

load(Key) ->
    erllama_cache_store:load(?STORE, Key).

%% The last record before the payload, if it is one: mode and digest.
digest(Root, Key) ->
    {ok, <<_:48/binary, Offset:64/little, _/binary>> = File} = file:read_file(file_of(Root, Key)),
    case binary:part(File, Offset - 38, 38) of
        <<?TAG, 33:32/little, Mode, Digest:32/binary>> -> {Mode, Digest};
        _ -> none
    end.
