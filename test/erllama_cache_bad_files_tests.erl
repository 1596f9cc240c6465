%% Files that are not what they should be, through the library and the store: a load answers what
%% was saved, or an error; after that error a save replaces the file; a start removes or skips it;
%% and no memory is taken for what a file only claims. Each kind of damage by some samples: the
%% thousands are in native/erllama_cache_core/tests/bad_files.rs.
-module(erllama_cache_bad_files_tests).

-include("erllama_cache_store_util.hrl").
-include_lib("eunit/include/eunit.hrl").

-import(erllama_cache_test_util, [
    each/3, temporary_dir/1, file_of/2, flip/3, patch/3, next_millisecond/0
]).
-import(erllama_cache_store_util, [running/3]).

-define(WRITER, erllama_cache_writer).
-define(SECRET, <<"0123456789abcdef0123456789ABCDEF">>).

%% What a start removes or skips, it logs: here that is the rule.
bad_files_test_() ->
    {setup, fun erllama_cache_test_util:silence/0, fun erllama_cache_test_util:unsilence/1, [
        each(fun() -> temporary_dir(?MODULE) end, fun file:del_dir_r/1, [
            fun damaged_with_a_checksum/1,
            fun damaged_with_a_digest/1,
            fun damaged_with_a_keyed_digest/1,
            fun a_file_under_anothers_name/1,
            fun a_last_use_in_the_future/1,
            fun a_terabyte_of_holes/1,
            fun holes_in_a_store/1
        ])
    ]}.

damaged_with_a_checksum(Root) ->
    damaged(Root, #{digest => none}).

damaged_with_a_digest(Root) ->
    damaged(Root, #{}).

damaged_with_a_keyed_digest(Root) ->
    damaged(Root, #{mac_key => fun() -> ?SECRET end}).

damaged(Root, Config) ->
    running(Root, Config, fun() ->
        Key = save(1),
        {ok, Good} = file:read_file(file_of(Root, Key)),
        [
            begin
                ok = file:write_file(file_of(Root, Key), Bad),
                assert_refused_or_right(What, Key),
                assert_saved_again(What, Key)
            end
         || {What, Bad} <- corpus(Good)
        ]
    end),
    [
        begin
            {ok, Key} = erllama_cache_store:key(meta(1)),
            ok = file:write_file(file_of(Root, Key), Bad),
            %% Whatever a start makes of it, the store runs and the key can be saved.
            running(Root, Config, fun() ->
                assert_refused_or_right(What, Key),
                assert_saved_again(What, Key)
            end)
        end
     || {What, Bad} <- few(corpus(good(Root, Config)))
    ].

%% What a save of key 1 leaves.
good(Root, Config) ->
    running(Root, Config, fun() ->
        {ok, Key} = erllama_cache_store:key(meta(1)),
        {ok, File} = file:read_file(file_of(Root, Key)),
        File
    end).

assert_refused_or_right(What, Key) ->
    case erllama_cache_store:load(?STORE, Key) of
        {ok, _Info, Payload} -> ?assertEqual({What, ?PAYLOAD}, {What, Payload});
        {error, {corrupt, Reason}} -> ?assert(is_atom(Reason));
        {error, unauthenticated} -> ok;
        %% Removed by the scan of the store's start.
        miss -> ok
    end.

assert_saved_again(What, Key) ->
    Saved = ?WRITER:save(?STORE, disk, meta(1), ?PAYLOAD),
    ?assert(Saved =:= {ok, Key} orelse Saved =:= {error, already_present}, What),
    {ok, _Info, Payload} = erllama_cache_store:load(?STORE, Key),
    ?assertEqual({What, ?PAYLOAD}, {What, Payload}).

%% Bits turned, ends cut off and put on, lengths and offsets that cannot be, and no file at all.
corpus(Good) ->
    Size = byte_size(Good),
    Bits = [{{bit, At}, flip(Good, At, 4)} || At <- lists:seq(0, Size - 1, 5)],
    Cut = [{{cut, At}, binary:part(Good, 0, At)} || At <- lists:seq(0, Size - 1, 13)],
    Long = [{{more, N}, <<Good/binary, 0:N/unit:8>>} || N <- [1, 4096]],
    Lengths = [
        {{field, At, Value}, set(Good, At, Width, Value)}
     || {At, Width} <- [{8, 4}, {40, 8}, {48, 8}, {56, 8}, {72, 4}],
        Value <- [0, 1 bsl 31, 1 bsl 32 - 1, 1 bsl 40, 1 bsl 63, 1 bsl 64 - 1]
    ],
    Both = [
        {{both, Value}, set(set(Good, 40, 8, Value), 56, 8, Value)}
     || Value <- [0, 1, 1 bsl 32, 1 bsl 40, 1 bsl 64 - 1]
    ],
    [{zeros, <<0:Size/unit:8>>}, {text, <<"KVC">>}] ++ Bits ++ Cut ++ Long ++ Lengths ++ Both.

few(Corpus) ->
    [lists:nth(N, Corpus) || N <- lists:seq(1, length(Corpus), 9)].

set(File, At, Width, Value) ->
    patch(File, At, <<Value:Width/little-unit:8>>).

a_file_under_anothers_name(Root) ->
    running(Root, #{}, fun() ->
        [A, B] = [file_of(Root, save(N)) || N <- [1, 2]],
        ok = file:rename(A, A ++ ".away"),
        ok = file:rename(B, A),
        ok = file:rename(A ++ ".away", B),
        [
            begin
                {ok, Key} = erllama_cache_store:key(meta(N)),
                Loaded = erllama_cache_store:load(?STORE, Key),
                ?assertEqual({error, {corrupt, key_mismatch}}, Loaded)
            end
         || N <- [1, 2]
        ]
    end).

%% It is not kept for ever at the cost of all others.
a_last_use_in_the_future(Root) ->
    [Ahead, Used] = running(Root, #{}, fun() -> [save(N) || N <- [1, 2]] end),
    {ok, File} = file:read_file(file_of(Root, Ahead)),
    ok = file:write_file(file_of(Root, Ahead), set(File, 32, 8, 1 bsl 64 - 1)),
    running(Root, #{max_bytes => 2 * byte_size(File) + 100}, fun() ->
        ok = next_millisecond(),
        ?assertMatch({ok, _, ?PAYLOAD}, erllama_cache_store:load(?STORE, Used)),
        _ = save(3),
        ?assertMatch({ok, _, ?PAYLOAD}, erllama_cache_store:load(?STORE, Used)),
        ?assertEqual(miss, erllama_cache_store:load(?STORE, Ahead))
    end).

%%% Holes

a_terabyte_of_holes(Root) ->
    running(Root, #{digest => none}, fun() ->
        Key = save(1),
        sparse(file_of(Root, Key), 1 bsl 40),
        Before = binaries(),
        Path = unicode:characters_to_binary(Root),
        {more, Load} = in_turn(fun(Turn) -> erllama_cache_nif:load(Turn, Path, Key, none) end),
        Slice = fun(Turn) -> erllama_cache_nif:load_more(Turn, Load) end,
        [?assertEqual(more, in_turn(Slice)) || _ <- lists:seq(1, 5)],
        ?assert(binaries() - Before < 64 bsl 20)
    end),
    %% A store starts over it: a scan reads headers only.
    running(Root, #{digest => none}, fun() ->
        ?assertMatch(#{files := 1, bytes := Bytes} when Bytes > 1 bsl 40,
                     erllama_cache_store:info(?STORE))
    end).

holes_in_a_store(Root) ->
    running(Root, #{digest => none}, fun() ->
        Key = save(1),
        sparse(file_of(Root, Key), 256 bsl 20),
        ?assertEqual({error, {corrupt, crc_mismatch}}, erllama_cache_store:load(?STORE, Key)),
        assert_saved_again(holes, Key)
    end).

%% Puts holes of so many bytes in the payload's place, and the header agrees.
sparse(Path, Bytes) ->
    {ok, File} = file:open(Path, [read, write, raw, binary]),
    {ok, <<_:48/binary, Start:64/little>>} = file:pread(File, 0, 56),
    ok = file:pwrite(File, [{At, <<Bytes:64/little>>} || At <- [40, 56]]),
    {ok, _} = file:position(File, Start),
    ok = file:truncate(File),
    {ok, _} = file:position(File, Start + Bytes),
    ok = file:truncate(File),
    ok = file:close(File).

%% Without the VM's own allocators, as under a sanitizer, nobody counts.
binaries() ->
    try
        erlang:memory(binary)
    catch
        error:notsup -> 0
    end.

%%% Helpers

meta(N) ->
    (erllama_cache_test_util:meta([N, 2, 3]))#{prompt_text => <<"prompt">>}.

save(N) ->
    {ok, Key} =
        case ?WRITER:save(?STORE, disk, meta(N), ?PAYLOAD) of
            {error, already_present} -> erllama_cache_store:key(meta(N));
            Saved -> Saved
        end,
    Key.

in_turn(Call) ->
    erllama_cache_io_limit:run(Call).
