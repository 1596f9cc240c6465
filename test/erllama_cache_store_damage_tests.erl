%% Files that are damaged, replaced or removed behind a running store's back. More kinds of damage
%% are in erllama_cache_bad_files_tests, what somebody hostile does in erllama_cache_hostile_SUITE.
-module(erllama_cache_store_damage_tests).

-include("erllama_cache_store_util.hrl").
-include_lib("kernel/include/file.hrl").
-include_lib("eunit/include/eunit.hrl").

-import(erllama_cache_store_util, [
    corrupt_payload/1, key/1, meta/1, patch_file/3, save/3, with_store/2, save/2
]).
-import(erllama_cache_test_util, [file_of/2, patch/3, flip/2, files/1]).

damage_test_() ->
    erllama_cache_store_util:store_tests([
        fun damage_is_found_by_a_load/1,
        fun a_corrupt_file_is_replaced_by_a_save/1,
        fun a_corrupt_file_can_be_deleted/1,
        fun a_link_is_not_followed/1,
        fun a_directory_under_the_name_is_an_error/1,
        fun a_missing_root_is_an_error/1
    ]).

damage_is_found_by_a_load(Root) ->
    with_store(#{root => Root}, fun(Store) ->
        %% Bigger than one piece of a read, so that no first read finds it all.
        Payload = rand:bytes(300_000),
        Meta = (meta(1))#{prompt_text => <<"prompt">>, hostname => <<>>, erllama_version => <<>>},
        {ok, Key} = erllama_cache_writer:save(Store, disk, Meta, Payload),
        Path = file_of(Root, Key),
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
            {unsupported_version, patch(Good, 3, <<3>>)},
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
                Damage(file_of(Root, Key)),
                {error, {corrupt, _}} = erllama_cache_store:load(Store, Key),
                ?assertEqual(Key, save(Store, 1, <<"new">>)),
                ?assertMatch({ok, _, <<"new">>}, erllama_cache_store:load(Store, Key)),
                ?assertEqual([filename:basename(file_of(Root, Key))], files(Root))
            end
         || Damage <- [
                fun erllama_cache_store_util:corrupt_payload/1,
                fun(Path) -> ok = file:write_file(Path, <<>>) end,
                fun(Path) -> patch_file(Path, 48, <<-1:64>>) end
            ]
        ],
        ?assertMatch(#{files := 1}, erllama_cache_store:info(Store))
    end).

a_corrupt_file_can_be_deleted(Root) ->
    with_store(#{root => Root}, fun(Store) ->
        Key = save(Store, 1),
        corrupt_payload(file_of(Root, Key)),
        {error, {corrupt, _}} = erllama_cache_store:load(Store, Key),
        ?assertEqual(ok, erllama_cache_store:delete(Store, Key)),
        ?assertEqual([], files(Root))
    end).

%% Neither by a load, for which the right file in the wrong place is no file of this root, nor by a
%% save, which takes the link's place.
a_link_is_not_followed(Root) ->
    Elsewhere = filename:join(Root, "elsewhere"),
    with_store(#{root => Root}, fun(Store) ->
        Key = save(Store, 1, <<"old">>),
        ok = file:rename(file_of(Root, Key), Elsewhere),
        ok = file:make_symlink(Elsewhere, file_of(Root, Key)),
        {ok, Old} = file:read_file(Elsewhere),
        ?assertEqual({error, {corrupt, not_regular}}, erllama_cache_store:load(Store, Key)),
        ?assertEqual(Key, save(Store, 1, <<"new">>)),
        ?assertMatch({ok, #file_info{type = regular}}, file:read_link_info(file_of(Root, Key))),
        ?assertMatch({ok, _, <<"new">>}, erllama_cache_store:load(Store, Key)),
        ?assertEqual({ok, Old}, file:read_file(Elsewhere))
    end).

a_directory_under_the_name_is_an_error(Root) ->
    with_store(#{root => Root}, fun(Store) ->
        ok = file:make_dir(file_of(Root, key(1))),
        ?assertEqual(
            {error, eisdir}, erllama_cache_writer:save(Store, disk, meta(1), ?PAYLOAD)
        ),
        ?assertMatch({error, _}, erllama_cache_store:delete(Store, key(1))),
        ?assertEqual([filename:basename(file_of(Root, key(1)))], files(Root)),
        ?assertMatch(#{files := 0, reservations := 0}, erllama_cache_store:info(Store))
    end).

a_missing_root_is_an_error(Root) ->
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
