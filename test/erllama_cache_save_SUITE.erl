%% One save, from its slot to the file under its name: what it writes, what is left when it fails,
%% and what it does with a name that is taken. What it asks of the host is in
%% erllama_cache_host_erllama_SUITE, the map that it takes in erllama_cache_meta_SUITE.
-module(erllama_cache_save_SUITE).

-include("erllama_cache_erllama_util.hrl").
-include_lib("common_test/include/ct.hrl").
-include_lib("kernel/include/file.hrl").
-include_lib("stdlib/include/assert.hrl").

-compile(export_all).

-import(erllama_cache_test_util, [
    fresh_dir/2, files/1, open_files/1, file_of/2, eventually/1, actor/0, ask/2, tell/2, answer/2,
    kill/1, run_command/2, patch/3, flip/2
]).
-import(erllama_cache_erllama_util, [
    meta/0, meta/1, start_writer/1, restart_writer/1, waiting/0, save/0, save/1, save/2,
    saved_and_forgotten/1, fails_and_is_undone/4, assert_nothing_left/1, assert_only/2,
    nothing_open/1, calls/0, calls_after_the_key/0, calls_but_the_check/0, args/1, token/1,
    stored_payload/2, payload/1, oracle/1, on_peer/2
]).

suite() ->
    erllama_cache_erllama_util:suite().

all() ->
    erllama_cache_erllama_util:all().

groups() ->
    erllama_cache_erllama_util:groups([
        {saving, [], [
            save_waits_for_a_slot,
            save_without_a_slot_does_nothing,
            file_has_its_name_and_mode,
            files_are_as_the_oracle_builds_them,
            later_save_takes_its_own_key
        ]},
        {failures, [], [
            root_is_missing,
            root_is_a_file,
            root_takes_no_files,
            root_is_read_only,
            disk_is_full,
            descriptors_run_out,
            root_vanishes_before_publishing,
            owner_dies_in_a_long_write
        ]},
        {taken_name, [], [
            valid_file_is_adopted,
            rewritten_hit_count_is_adopted,
            name_taken_while_writing,
            damaged_file_is_replaced,
            file_of_another_key_is_replaced,
            file_of_the_other_version_is_replaced,
            fifo_is_replaced,
            link_is_replaced_and_its_target_stays,
            directory_is_an_error
        ]}
    ]).

%%% Saving

save_waits_for_a_slot(_Config) ->
    ok = ?WRITER:set_max_concurrent(1),
    ok = ?WRITER:acquire(0),
    Actor = actor(),
    Saving = tell(Actor, fun() -> save() end),
    eventually(fun() -> waiting() =:= [Actor] end),
    ?assertEqual([], erllama_fake:calls()),
    ok = ?WRITER:release(),
    ?assertMatch({ok, _}, answer(Actor, Saving)),
    ?assertEqual(0, ?WRITER:current()).

save_without_a_slot_does_nothing(Config) ->
    ok = ?WRITER:set_max_concurrent(1),
    ok = ?WRITER:acquire(0),
    Actor = actor(),
    [
        ?assertEqual(
            {error, max_concurrent},
            ask(Actor, fun() -> ?WRITER:save(?TIER, disk, meta(), ?PAYLOAD, Ms) end)
        )
     || Ms <- [0, 10]
    ],
    ?assertEqual([], erllama_fake:calls()),
    ?assertEqual(#{}, erllama_cache_counters:all()),
    ok = ?WRITER:release(),
    assert_nothing_left(Config).

file_has_its_name_and_mode(Config) ->
    Root = ?config(root, Config),
    {ok, Private} = save(meta([1])),
    _ = restart_writer(#{max_concurrent => 1, file_mode => 8#664}),
    {ok, Shared} = save(meta([2])),
    Expected = [
        {<<(string:lowercase(binary:encode_hex(Key)))/binary, ".kvc">>, Mode}
     || {Key, Mode} <- [{Private, 8#100600}, {Shared, 8#100664}]
    ],
    ?assertEqual(lists:sort([binary_to_list(Name) || {Name, _} <- Expected]), files(Root)),
    [
        begin
            {ok, #file_info{mode = Actual}} = file:read_file_info(filename:join(Root, Name)),
            ?assertEqual(Mode, Actual)
        end
     || {Name, Mode} <- Expected
    ].

%% Byte for byte, but for the digest, which the oracle checks and does not build.
files_are_as_the_oracle_builds_them(Config) ->
    _ = restart_writer(#{max_concurrent => ?LIMIT, digest => none}),
    [built_alike(Meta, Payload, Config) || {Meta, Payload} <- varied()].

built_alike(Meta, Payload, Config) ->
    Root = ?config(root, Config),
    {ok, Key} = save(Meta, Payload),
    {ok, File} = file:read_file(file_of(Root, Key)),
    [Json, Raw, Built] = [filename:join(Root, Name) || Name <- ["json", "raw", "built"]],
    ok = file:write_file(Json, json(Meta#{version => erllama_fake_kvc:version()})),
    ok = file:write_file(Raw, Payload),
    ?assertEqual({0, ""}, oracle(["build", Json, Raw, Built])),
    {ok, Expected} = file:read_file(Built),
    ?assertEqual(byte_size(Expected), byte_size(File)),
    ?assert(Expected =:= File).

varied() ->
    Complete = #{creation_time => 1700000000, last_used_time => 1700000001, hostname => <<"host">>,
                 erllama_version => <<"1.2.3">>},
    Extreme = Complete#{creation_time := 16#ffffffffffffffff, last_used_time := 0,
                        hit_count => 16#ffffffff, context_size => 16#ffffffff, quant_bits => 255},
    [
        {maps:merge(meta(), Complete), <<>>},
        {maps:merge(maps:remove(prompt_text, meta([3])), Complete), <<"no prompt">>},
        {maps:merge(meta([]), Extreme), <<0>>},
        {maps:merge(meta([-1, 1 bsl 32, 1 bsl 70 + 9, -(1 bsl 63)]), Complete), ?PAYLOAD},
        {
            maps:merge(meta(lists:seq(0, 5000)), Complete#{
                prompt_text => <<"Wie heißt es? 何"/utf8>>,
                save_reason => finish,
                save_reason_detail => <<"end of turn">>,
                fingerprint_mode => gguf_chunked,
                quant_type => iq2_xxs
            }),
            crypto:strong_rand_bytes(70000)
        },
        {
            maps:merge(meta([7]), Complete#{
                hostname := <<>>, erllama_version := <<>>, save_reason => unknown,
                fingerprint_mode => fast_unsafe, quant_type => bf16, quant_bits => 0
            }),
            %% Large enough to be written in pieces.
            crypto:strong_rand_bytes(2500000)
        }
        | [
            {maps:merge(meta([8]), Complete#{save_reason => agent_prefix}), <<"system and tools">>}
         || erllama_fake_kvc:version() =:= 2
        ]
    ].

%% A build_meta map as JSON. Its texts have nothing in them that has to be escaped.
json(Meta) ->
    ["{", lists:join(", ", [[$", atom_to_list(Key), "\": ", json(Key, Value)]
                            || {Key, Value} <- maps:to_list(Meta)]), "}"].

json(Key, Hash) when Key =:= fingerprint; Key =:= ctx_params_hash ->
    [$", binary:encode_hex(Hash), $"];
json(_Key, Integer) when is_integer(Integer) ->
    integer_to_list(Integer);
json(_Key, Atom) when is_atom(Atom) ->
    [$", atom_to_list(Atom), $"];
json(_Key, Text) when is_binary(Text) ->
    [$", Text, $"];
json(_Key, Integers) when is_list(Integers) ->
    ["[", lists:join(",", [integer_to_list(Integer) || Integer <- Integers]), "]"].

%% One process's saves have nothing to do with each other.
later_save_takes_its_own_key(Config) ->
    {ok, First} = save(meta([1]), <<"first">>),
    {ok, Second} = save(meta([2]), <<"second">>),
    ?assertEqual(
        {<<"first">>, <<"second">>}, {stored_payload(Config, First), stored_payload(Config, Second)}
    ),
    ?assertEqual(lists:sort([First, Second]), lists:sort(?META_SRV:stored())).

%%% What can fail

root_is_missing(Config) ->
    Missing = filename:join(?config(root, Config), "missing"),
    fails_and_is_undone({error, enoent}, Missing, ?PAYLOAD, Config),
    ?assertEqual([], files(?config(root, Config))).

root_is_a_file(Config) ->
    Root = ?config(root, Config),
    File = filename:join(Root, "file"),
    ok = file:write_file(File, <<"not a directory">>),
    fails_and_is_undone({error, enotdir}, File, ?PAYLOAD, Config),
    ?assertEqual(["file"], files(Root)),
    ?assertEqual({ok, <<"not a directory">>}, file:read_file(File)),
    ok = file:delete(File).

%% A directory in which not even root can create files.
root_takes_no_files(Config) ->
    case filelib:is_dir("/proc/self/fd") of
        true ->
            ok = erllama_fake:script(dir, [{return, "/proc"}]),
            ?assertMatch({error, Reason} when is_atom(Reason), save()),
            ?assertEqual([reserve_save, dir, cancel_reservation], calls_but_the_check()),
            assert_nothing_left(Config);
        false ->
            {skip, "no /proc"}
    end.

root_is_read_only(Config) ->
    Root = ?config(root, Config),
    case mount_tmpfs(Root, "ro") of
        ok -> fails_and_is_undone({error, erofs}, Root, ?PAYLOAD, Config);
        Skip -> Skip
    end.

%% Small and large files ask for their space in different ways; neither may keep it.
disk_is_full(Config) ->
    Root = ?config(root, Config),
    case mount_tmpfs(Root, "size=512k") of
        ok ->
            fails_and_is_undone({error, enospc}, Root, <<0:(800 * 1024 * 8)>>, Config),
            fails_and_is_undone({error, enospc}, Root, <<0:(3 * 1024 * 1024 * 8)>>, Config),
            {ok, Key} = save(meta(), <<0:(400 * 1024 * 8)>>),
            ?assertEqual([filename:basename(file_of(Root, Key))], files(Root));
        Skip ->
            Skip
    end.

mount_tmpfs(Dir, Options) ->
    case run_command("mount", ["-t", "tmpfs", "-o", Options, "tmpfs", Dir]) of
        {0, _} -> ok;
        not_found -> {skip, "no mount"};
        {_, Output} -> {skip, "tmpfs cannot be mounted, which takes root: " ++ Output}
    end.

descriptors_run_out(Config) ->
    Root = ?config(root, Config),
    %% On a node with few of them.
    Shell = ["/bin/sh", "-c", "ulimit -n 256 && exec \"$0\" \"$@\"", os:find_executable("erl")],
    Name = on_peer(Shell, fun() -> save_without_descriptors(Root) end),
    ?assertEqual([Name], files(Root)).

save_without_descriptors(Root) ->
    ok = erllama_fake:start(?TIER, Root),
    _ = start_writer(1),
    %% Whatever a first save loads or opens for good is there afterwards.
    {ok, First} = save(meta([1])),
    ok = file:delete(file_of(Root, First)),
    Descriptors = use_up_descriptors([]),
    ok = erllama_fake:forget_calls(),
    ?assertEqual({error, emfile}, save()),
    ?assertEqual([reserve_save, cancel_reservation], calls_but_the_check()),
    ?assertEqual({0, []}, {?WRITER:current(), ?META_SRV:reserved()}),
    %% One is enough for the root, not for the file in it.
    ok = file:close(hd(Descriptors)),
    ?assertEqual({error, emfile}, save()),
    ok = lists:foreach(fun file:close/1, tl(Descriptors)),
    ?assertEqual([], files(Root)),
    {ok, Key} = save(),
    filename:basename(file_of(Root, Key)).

use_up_descriptors(Sofar) ->
    case file:open("/dev/null", [read, raw]) of
        {ok, Descriptor} -> use_up_descriptors([Descriptor | Sofar]);
        {error, emfile} -> Sofar
    end.

root_vanishes_before_publishing(Config) ->
    Root = fresh_dir("vanishing", Config),
    ok = erllama_fake:script(dir, [{return, Root}]),
    ok = erllama_fake:script(check_reservation, [
        {before, fun(_) -> ok = file:del_dir(Root) end}
    ]),
    ?assertEqual({error, enoent}, save()),
    ?assertEqual(
        [reserve_save, dir, check_reservation, cancel_reservation], calls_after_the_key()
    ),
    ok = nothing_open(Root),
    assert_nothing_left(Config).

%% The kill takes effect in the write, or else before anything is published.
owner_dies_in_a_long_write(Config) ->
    case filelib:is_dir("/proc/self/fd") of
        true ->
            Root = ?config(root, Config),
            ok = erllama_fake:script(check_reservation, [
                {before, fun(_Args) -> receive never -> ok end end}
            ]),
            Payload = binary:copy(<<"payload.">>, 8 * 1024 * 1024),
            Owner = actor(),
            _ = tell(Owner, fun() -> save(meta(), Payload) end),
            eventually(fun() -> open_files(Root) =/= [] end),
            kill(Owner),
            eventually(fun() -> ?WRITER:current() =:= 0 end),
            eventually(fun() -> open_files(Root) =:= [] end),
            eventually(fun() -> ?META_SRV:reserved() =:= [] end),
            ?assertEqual([], files(Root)),
            ok = erllama_fake:script(check_reservation, []),
            ?assertMatch({ok, _}, save());
        false ->
            {skip, "no /proc, in which a file without a name could be seen"}
    end.

%%% The final name is taken

%% The stored payload wins: others may be reading it.
valid_file_is_adopted(Config) ->
    {Key, Path} = saved_and_forgotten(Config),
    {ok, <<Header:48/binary, _/binary>> = File} = file:read_file(Path),
    {ok, #file_info{inode = Inode}} = file:read_file_info(Path),
    Size = byte_size(File),
    ?assertEqual({ok, Key}, save(meta(), <<"a longer payload, which is dropped">>)),
    ?assertEqual({ok, File}, file:read_file(Path)),
    ?assertMatch({ok, #file_info{inode = Inode}}, file:read_file_info(Path)),
    %% Told is what stands there.
    ?assertMatch([[Key, _, Path]], args(mark_published)),
    ?assertMatch([[Key, _, Size, Header | _]], args(announce_saved)),
    assert_only(Path, Config).

%% The host counts hits in the file itself: that does not make it invalid.
rewritten_hit_count_is_adopted(Config) ->
    {Key, Path} = saved_and_forgotten(Config),
    {ok, <<Before:12/binary, _:32, After/binary>>} = file:read_file(Path),
    Counted = <<Before/binary, 41:32/little, After/binary>>,
    ok = file:write_file(Path, Counted),
    ?assertEqual({ok, Key}, save(meta(), <<"dropped">>)),
    ?assertEqual({ok, Counted}, file:read_file(Path)),
    assert_only(Path, Config).

name_taken_while_writing(Config) ->
    {Key, Path} = saved_and_forgotten(Config),
    {ok, Valid} = file:read_file(Path),
    [
        begin
            ok = file:delete(Path),
            ok = erllama_fake:script(check_reservation, [
                {before, fun(_) -> ok = file:write_file(Path, Content) end}
            ]),
            ?assertEqual({ok, Key}, save(meta(), <<"ours">>)),
            ?assertEqual(Wins, stored_payload(Config, Key)),
            assert_only(Path, Config),
            ok = ?META_SRV:forget(Key)
        end
     || {Content, Wins} <- [{Valid, ?PAYLOAD}, {<<"no such file">>, <<"ours">>}]
    ].

damaged_file_is_replaced(Config) ->
    {Key, Path} = saved_and_forgotten(Config),
    {ok, Valid} = file:read_file(Path),
    [
        begin
            ?assertNotEqual(Valid, Damaged),
            ok = file:write_file(Path, Damaged),
            ?assertEqual({What, {ok, Key}}, {What, save(meta(), <<"whole">>)}),
            ?assertEqual({What, <<"whole">>}, {What, stored_payload(Config, Key)}),
            assert_only(Path, Config),
            ok = ?META_SRV:forget(Key)
        end
     || {What, Damaged} <- damaged(Valid)
    ].

damaged(Valid) ->
    Size = byte_size(Valid),
    Offset = Size - byte_size(payload(Valid)),
    <<_:72/binary, PromptLen:32/little, _/binary>> = Valid,
    TlvAt = 76 + PromptLen,
    [
        {empty, <<>>},
        {one_byte, <<"K">>},
        {header_only, binary:part(Valid, 0, 48)},
        {no_sections, binary:part(Valid, 0, 72)},
        {no_payload, binary:part(Valid, 0, Offset)},
        {truncated, binary:part(Valid, 0, Size - 1)},
        {trailing, <<Valid/binary, 0>>},
        {text, binary:copy(<<"not a cache file ">>, 1000)},
        {zeroes, <<0:(Size * 8)>>},
        {magic, patch(Valid, 0, <<"KVD">>)},
        {payload_bit, flip(Valid, Size - 1)},
        {crc, flip(Valid, 64)},
        {payload_bytes, patch(Valid, 40, <<16#ffffffffffffffff:64/little>>)},
        {payload_offset, patch(Valid, 48, <<16#ffffffffffffffff:64/little>>)},
        {payload_offset_low, patch(Valid, 48, <<0:64>>)},
        {payload_length, patch(Valid, 56, <<16#ffffffffffffffff:64/little>>)},
        {all_lengths, patch(Valid, 40, binary:copy(<<16#7fffffffffffffff:64/little>>, 3))},
        {prompt_length, patch(Valid, 72, <<16#ffffffff:32/little>>)},
        {tlv_length, patch(Valid, TlvAt, <<16#ffffffff:32/little>>)},
        {tlv_value_length, patch(Valid, TlvAt + 5, <<16#ffffffff:32/little>>)}
    ].

file_of_another_key_is_replaced(Config) ->
    {Key, Path} = saved_and_forgotten(Config),
    {ok, Other} = save(meta([99]), <<"another key's">>),
    {ok, _} = file:copy(file_of(?config(root, Config), Other), Path),
    ok = file:delete(file_of(?config(root, Config), Other)),
    ?assertEqual({ok, Key}, save(meta(), <<"its own">>)),
    ?assertEqual(<<"its own">>, stored_payload(Config, Key)),
    assert_only(Path, Config).

%% It is whole, without a digest to be wrong, and of the same key in its version, for the prompt's
%% bytes are those of the tokens; but the host's parser does not take it.
file_of_the_other_version_is_replaced(Config) ->
    _ = restart_writer(#{max_concurrent => ?LIMIT, digest => none}),
    Meta = (meta([1, 2]))#{prompt_text => <<1:32/little, 2:32/little>>},
    {ok, Key} = save(Meta),
    Path = file_of(?config(root, Config), Key),
    {ok, <<"KVC", Version, Rest/binary>>} = file:read_file(Path),
    ok = file:write_file(Path, <<"KVC", (3 - Version), Rest/binary>>),
    ?assertMatch({0, _}, oracle(["check", Path])),
    ok = ?META_SRV:forget(Key),
    ?assertEqual({ok, Key}, save(Meta, <<"of the host's version">>)),
    ?assertEqual(<<"of the host's version">>, stored_payload(Config, Key)),
    ?assertMatch({ok, <<"KVC", Version, _/binary>>}, file:read_file(Path)),
    assert_only(Path, Config).

%% Opening one to read waits for a writer, who never comes: the timetrap would tell.
fifo_is_replaced(Config) ->
    {Key, Path} = saved_and_forgotten(Config),
    ok = file:delete(Path),
    case run_command("mkfifo", [Path]) of
        {0, _} ->
            ?assertEqual({ok, Key}, save()),
            ?assertMatch({ok, #file_info{type = regular}}, file:read_link_info(Path)),
            ?assertEqual(?PAYLOAD, stored_payload(Config, Key)),
            assert_only(Path, Config);
        _ ->
            {skip, "no mkfifo"}
    end.

link_is_replaced_and_its_target_stays(Config) ->
    {Key, Path} = saved_and_forgotten(Config),
    {ok, Valid} = file:read_file(Path),
    Elsewhere = fresh_dir("elsewhere", Config),
    Target = filename:join(Elsewhere, "target"),
    [
        begin
            ok = file:delete(Path),
            [ok = file:write_file(Target, Content) || is_binary(Content)],
            ok = file:make_symlink(To, Path),
            ?assertEqual({ok, Key}, save(meta(), <<"ours">>)),
            ?assertMatch({ok, #file_info{type = regular}}, file:read_link_info(Path)),
            ?assertEqual(<<"ours">>, stored_payload(Config, Key)),
            [?assertEqual({ok, Content}, file:read_file(Target)) || is_binary(Content)],
            assert_only(Path, Config),
            ok = ?META_SRV:forget(Key)
        end
     || {To, Content} <- [
            {Target, <<"precious">>},
            {Target, Valid},
            {filename:join(Elsewhere, "nothing"), none},
            {filename:basename(Path), none},
            {Elsewhere, none}
        ]
    ],
    ?assertEqual(["target"], files(Elsewhere)).

directory_is_an_error(Config) ->
    {Key, Path} = saved_and_forgotten(Config),
    ok = file:delete(Path),
    ok = file:make_dir(Path),
    ok = file:write_file(filename:join(Path, "kept"), <<>>),
    ?assertMatch({error, Reason} when is_atom(Reason), save()),
    ?assertEqual(cancel_reservation, lists:last(calls())),
    ?assertEqual([[Key, token(check_reservation)]], args(cancel_reservation)),
    ?assertEqual(["kept"], files(Path)),
    assert_only(Path, Config),
    %% No file for the host, left on purpose.
    ok = file:del_dir_r(Path).
