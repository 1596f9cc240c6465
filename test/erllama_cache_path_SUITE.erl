%% Roots as strings and as binaries, in and beyond ASCII, and what is no path at all.
-module(erllama_cache_path_SUITE).

-include("erllama_cache_erllama_util.hrl").
-include_lib("common_test/include/ct.hrl").
-include_lib("stdlib/include/assert.hrl").

-compile(export_all).

-import(erllama_cache_test_util, [file_of/2, run_command/2]).
-import(erllama_cache_erllama_util, [
    meta/1, start_writer/1, save/0, save/1, fails_and_is_undone/4, script_dir/1, calls/0, args/1,
    payload/1, on_peer/2
]).

suite() ->
    erllama_cache_erllama_util:suite().

all() ->
    erllama_cache_erllama_util:all().

groups() ->
    erllama_cache_erllama_util:groups([
        root_as_string_and_binary,
        root_with_a_nul,
        roots_beyond_ascii
    ]).

root_as_string_and_binary(Config) ->
    Root = ?config(root, Config),
    [
        begin
            ok = script_dir([{return, Given}]),
            {ok, Key} = save(meta([N])),
            [_, _, Path] = lists:last(args(mark_published)),
            ?assertEqual(file_of(Given, Key), Path),
            ?assert(filelib:is_regular(Path))
        end
     || {N, Given} <- [{1, Root}, {2, list_to_binary(Root)}, {3, Root ++ "/"}]
    ].

root_with_a_nul(Config) ->
    Root = ?config(root, Config),
    [
        fails_and_is_undone({error, badarg}, Bad, ?PAYLOAD, Config)
     || Bad <- [Root ++ [0], <<(list_to_binary(Root))/binary, 0, "x">>]
    ].

%% A node reads and writes file names in one of two encodings, whatever the disk holds.
roots_beyond_ascii(Config) ->
    [
        begin
            Base = ?config(root, Config) ++ "/" ++ Flag,
            ok = file:make_dir(Base),
            Saved = on_peer(["erl", Flag], fun() -> save_beyond_ascii(Base) end),
            ?assertEqual(Expected, Saved),
            %% Their names mean nothing to this node.
            {0, _} = run_command("rm", ["-r", Base])
        end
     || {Flag, Expected} <- [
            {"+fnu", [ok, ok, ok, ok]},
            {"+fnl", [ok, {error, {unencodable, latin1}}, ok, ok]}
        ]
    ].

save_beyond_ascii(Base) ->
    _ = start_writer(1),
    BaseBin = list_to_binary(Base),
    Roots = [
        filename:join(Base, [$c, $a, $f, 16#e9]),
        filename:join(Base, [16#43a, 16#44d, 16#448]),
        <<BaseBin/binary, "/日本"/utf8>>,
        %% Latin-1, or any bytes that are no UTF-8.
        <<BaseBin/binary, "/", 16#e9, 16#ff>>
    ],
    [save_in(Root) || Root <- Roots].

save_in(Root) ->
    %% What the node cannot name it cannot create either, and it does not have to.
    Made = try file:make_dir(Root) catch error:badarg -> badarg end,
    ok = erllama_fake:start(?TIER, Root),
    Result = save(),
    ?assertEqual({0, []}, {?WRITER:current(), ?META_SRV:reserved()}),
    Outcome =
        case Result of
            {ok, Key} ->
                ok = Made,
                ?assertMatch([[Key, _, Path]] when is_list(Path) =:= is_list(Root),
                             args(mark_published)),
                [[_, _, Path]] = args(mark_published),
                {ok, File} = file:read_file(Path),
                ?assertEqual(?PAYLOAD, payload(File)),
                ok;
            {error, _} ->
                ?assertEqual(cancel_reservation, lists:last(calls())),
                Result
        end,
    ok = erllama_fake:stop(),
    Outcome.
