%% Tag 0xB3: who gets a digest, what it finds, and what a secret does.
-module(erllama_cache_digest_tests).

-include_lib("eunit/include/eunit.hrl").

-define(STORE, digest_store).
-define(WRITER, erllama_cache_writer).
-define(KEY, <<"0123456789abcdef0123456789ABCDEF">>).
-define(OTHER_KEY, <<42:256>>).
-define(TAG, 16#b3).

digest_test_() ->
    {foreach, fun root/0, fun file:del_dir_r/1, [
        fun(Root) -> {atom_to_list(Name), {timeout, 60, fun() -> Test(Root) end}} end
     || {Name, Test} <- [
            {tier_disk_has_one_and_ram_file_none, fun tiers/1},
            {either_can_be_chosen, fun chosen/1},
            {it_covers_what_no_checksum_does, fun covers/1},
            {loads_may_note_their_use, fun notes/1},
            {large_files_have_one_too, fun large/1},
            {a_keyed_file_is_loaded, fun keyed/1},
            {without_the_secret_its_maker_is_nobodys_business, fun keyed_without/1},
            {what_is_not_proven_is_refused, fun unauthenticated/1},
            {what_is_not_proven_is_replaced, fun replaced/1},
            {a_scan_skips_what_is_not_proven, fun scanned/1},
            {a_secret_comes_from_a_file, fun from_file/1},
            {a_bad_secret_starts_nothing, fun bad_secret/1},
            {a_secret_is_shown_nowhere, fun shown/1},
            {a_file_may_leave_the_page_cache, fun page_cache/1}
        ]
    ]}.

%%% Who has one

tiers(Root) ->
    running(Root, #{}, fun() -> ?assertMatch({0, _}, digest(Root, save(1))) end),
    ram(Root, #{}, fun() -> ?assertEqual(none, digest(Root, save(ram_file, 2))) end).

chosen(Root) ->
    running(Root, #{digest => none}, fun() -> ?assertEqual(none, digest(Root, save(1))) end),
    ram(Root, #{digest => blake3}, fun() ->
        ?assertMatch({0, _}, digest(Root, save(ram_file, 2)))
    end).

%%% What it finds

covers(Root) ->
    running(Root, #{}, fun() ->
        Key = save(1),
        {ok, Good} = file:read_file(path(Root, Key)),
        %% quant_bits, context_size, creation_time, the prompt's text
        [
            begin
                ok = file:write_file(path(Root, Key), flip(Good, At)),
                ?assertEqual({error, {corrupt, digest_mismatch}}, load(Key))
            end
         || At <- [4, 16, 24, 76]
        ],
        %% hit_count and last_used_time are left out: they change.
        [
            begin
                ok = file:write_file(path(Root, Key), flip(Good, At)),
                ?assertMatch({ok, _, <<"payload">>}, load(Key))
            end
         || At <- [12, 32]
        ]
    end).

%% A note of use leaves the digest right.
notes(Root) ->
    running(Root, #{}, fun() ->
        Meta = (meta(1))#{last_used_time => 1000},
        {ok, Key} = ?WRITER:save(?STORE, disk, Meta, <<"payload">>),
        ok = erllama_cache_test_util:eventually(fun() ->
            {ok, #{hit_count := Hits}, <<"payload">>} = load(Key),
            Hits > 0
        end)
    end).

%% More than one block, the last one not whole: hashed beside the writing and the reading.
large(Root) ->
    running(Root, #{}, fun() ->
        Payload = rand:bytes(9 * 1048576 + 12345),
        {ok, Key} = ?WRITER:save(?STORE, disk, meta(1), Payload),
        ?assertMatch({ok, _, Payload}, load(Key)),
        {ok, Good} = file:read_file(path(Root, Key)),
        ?assertMatch({0, _}, digest(Root, Key)),
        ok = file:write_file(path(Root, Key), flip(Good, 4)),
        ?assertEqual({error, {corrupt, digest_mismatch}}, load(Key))
    end).

%%% With a secret

secret(Key) -> fun() -> Key end.

keyed(Root) ->
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

keyed_without(Root) ->
    Key = running(Root, #{mac_key => secret(?KEY)}, fun() -> save(1) end),
    running(Root, #{}, fun() -> ?assertMatch({ok, _, <<"payload">>}, load(Key)) end).

unauthenticated(Root) ->
    Plain = running(Root, #{}, fun() -> save(1) end),
    None = running(Root, #{digest => none}, fun() -> save(2) end),
    Others = running(Root, #{mac_key => secret(?OTHER_KEY)}, fun() -> save(3) end),
    running(Root, #{mac_key => secret(?KEY)}, fun() ->
        [?assertEqual({error, unauthenticated}, load(Key)) || Key <- [Plain, None, Others]],
        Key = save(4),
        {ok, Good} = file:read_file(path(Root, Key)),
        %% Whoever rewrites payload and checksum cannot rewrite this.
        [
            begin
                ok = file:write_file(path(Root, Key), flip(Good, At)),
                ?assertEqual({error, unauthenticated}, load(Key))
            end
         || At <- [4, 76]
        ],
        ?assertMatch(#{refused := 5}, erllama_cache_store:info(?STORE))
    end).

replaced(Root) ->
    Key = running(Root, #{}, fun() -> save(1) end),
    running(Root, #{mac_key => secret(?KEY)}, fun() ->
        ?assertEqual({error, unauthenticated}, load(Key)),
        ?assertEqual({ok, Key}, ?WRITER:save(?STORE, disk, meta(1), <<"proven">>)),
        ?assertMatch({ok, _, <<"proven">>}, load(Key))
    end).

scanned(Root) ->
    Plain = running(Root, #{}, fun() -> save(1) end),
    Keyed = running(Root, #{mac_key => secret(?KEY)}, fun() -> save(2) end),
    running(Root, #{mac_key => secret(?KEY)}, fun() ->
        ?assertMatch(#{files := 2}, erllama_cache_store:info(?STORE)),
        ?assertMatch({ok, _, _}, load(Keyed)),
        ?assertEqual({error, unauthenticated}, load(Plain)),
        %% Left where it is: it may be somebody else's.
        ?assert(filelib:is_regular(path(Root, Plain)))
    end),
    %% But it has its room, and is what goes first.
    Bound = filelib:file_size(path(Root, Plain)) + filelib:file_size(path(Root, Keyed)),
    ok = file:change_time(path(Root, Plain), {{2020, 1, 1}, {0, 0, 0}}),
    running(Root, #{mac_key => secret(?KEY), max_bytes => Bound}, fun() ->
        _ = save(3),
        ?assertNot(filelib:is_file(path(Root, Plain)))
    end).

from_file(Root) ->
    Hex = binary:encode_hex(?KEY),
    Key = running(Root, #{mac_key => secret(?KEY)}, fun() -> save(1) end),
    [
        begin
            File = filename:join(Root, "secret"),
            ok = file:write_file(File, Contents),
            running(Root, #{mac_key => {file, File}}, fun() ->
                ?assertMatch({ok, _, <<"payload">>}, load(Key))
            end)
        end
     || Contents <- [?KEY, Hex, string:lowercase(Hex), [Hex, "\n"], [Hex, "\r\n"]]
    ].

bad_secret(Root) ->
    File = filename:join(Root, "secret"),
    [
        begin
            ok = file:write_file(File, Contents),
            ?assertEqual(
                {error, {mac_key, bad_key}}, start_store(Root, #{mac_key => {file, File}})
            ),
            ?assertEqual({error, {mac_key, bad_key}}, start_writer(#{mac_key => {file, File}}))
        end
     || Contents <- ["", "short", lists:duplicate(64, $g), [?KEY, "\n"]]
    ],
    [
        begin
            ?assertEqual({error, {mac_key, Reason}}, start_store(Root, #{mac_key => Source})),
            ?assertEqual({error, {mac_key, Reason}}, start_writer(#{mac_key => Source}))
        end
     || {Reason, Source} <- [
            {enoent, {file, filename:join(Root, "none")}},
            {bad_key, secret(<<"short">>)},
            {bad_key, secret(not_a_binary)},
            {raised, fun() -> error(?KEY) end}
        ]
    ],
    %% The key itself is no source; what is told of it does not have it.
    ?assertError({invalid_option, mac_key, hidden}, start_store(Root, #{mac_key => ?KEY})),
    ?assertError({invalid_config, mac_key, hidden}, start_writer(#{mac_key => ?KEY})).

shown(Root) ->
    running(Root, #{mac_key => secret(?KEY)}, fun() ->
        Key = save(1),
        {ok, _, _} = load(Key),
        Shown = [
            persistent_term:get(), ?WRITER:info(), erllama_cache_store:info(?STORE),
            ets:tab2list(?STORE), sys:get_state(?STORE), sys:get_state(?WRITER),
            process_info(self(), dictionary), Key
        ],
        Printed = unicode:characters_to_binary(io_lib:format("~w ~p", [Shown, Shown])),
        Bytes = iolist_to_binary(lists:join($,, [integer_to_list(B) || <<B>> <= ?KEY])),
        [
            ?assertEqual(nomatch, binary:match(Printed, Secret))
         || Secret <- [?KEY, Bytes, binary:encode_hex(?KEY)]
        ]
    end).

%%% The page cache

page_cache(Root) ->
    running(Root, #{page_cache => drop}, fun() ->
        Payload = rand:bytes(2 * 1048576),
        {ok, Key} = ?WRITER:save(?STORE, disk, meta(1), Payload),
        ?assertMatch({ok, _, Payload}, load(Key))
    end),
    ?assertError({invalid_config, page_cache, sometimes}, start_writer(#{page_cache => sometimes})).

%%% Helpers

root() ->
    Name = "erllama_cache_digest." ++ integer_to_list(erlang:unique_integer([positive])),
    Root = filename:join(os:getenv("TMPDIR", "/tmp"), os:getpid() ++ Name),
    ok = file:make_dir(Root),
    Root.

running(Root, Config, Fun) ->
    running(Root, disk, Config, Fun).

ram(Root, Config, Fun) ->
    running(Root, ram_file, Config, Fun).

running(Root, Tier, Config, Fun) ->
    {ok, Store} = start_store(Root, (maps:with([mac_key, max_bytes], Config))#{tier => Tier}),
    {ok, Writer} = start_writer(maps:remove(max_bytes, Config)),
    try
        Fun()
    after
        [ok = gen_server:stop(Pid) || Pid <- [Writer, Store]]
    end.

%% A server that does not start takes who is linked to it along.
start_store(Root, Options) ->
    trapping(fun() -> erllama_cache_store:start_link(?STORE, Options#{root => Root}) end).

start_writer(Config) ->
    trapping(fun() -> ?WRITER:start_link(Config#{host => erllama_cache_store}) end).

trapping(Start) ->
    Trapped = process_flag(trap_exit, true),
    try Start() of
        {error, Reason} = Error ->
            %% From OTP 26 on, it has been received by who started it.
            Consumed = list_to_integer(erlang:system_info(otp_release)) >= 26,
            Consumed orelse receive {'EXIT', _, Reason} -> true end,
            Error;
        Started ->
            Started
    after
        process_flag(trap_exit, Trapped)
    end.

meta(N) ->
    #{
        save_reason => cold, quant_bits => 16, quant_type => f16, fingerprint => <<N:256>>,
        fingerprint_mode => safe, ctx_params_hash => <<2:256>>, tokens => [1, 2, 3],
        context_size => 4096, prompt_text => <<"prompt">>
    }.

save(N) ->
    save(disk, N).

save(Tier, N) ->
    {ok, Key} = ?WRITER:save(?STORE, Tier, meta(N), <<"payload">>),
    Key.

load(Key) ->
    erllama_cache_store:load(?STORE, Key).

path(Root, Key) ->
    erllama_cache_path:final(Root, Key).

%% The last record before the payload, if it is one: mode and digest.
digest(Root, Key) ->
    {ok, <<_:48/binary, Offset:64/little, _/binary>> = File} = file:read_file(path(Root, Key)),
    case binary:part(File, Offset - 38, 38) of
        <<?TAG, 33:32/little, Mode, Digest:32/binary>> -> {Mode, Digest};
        _ -> none
    end.

flip(File, At) ->
    <<Before:At/binary, Byte, After/binary>> = File,
    <<Before/binary, (Byte bxor 1), After/binary>>.
