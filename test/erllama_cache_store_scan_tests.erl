%% What a store that starts makes of the files that it finds in its root.
-module(erllama_cache_store_scan_tests).

-include("erllama_cache_store_util.hrl").
-include_lib("eunit/include/eunit.hrl").

-import(erllama_cache_store_util, [
    bytes_in/1, corrupt_payload/1, meta/1, patch_file/3, with_store/2, save/2
]).
-import(erllama_cache_test_util, [file_of/2, patch/3, files/1, logged/1, run_command/2]).

%% Called in another node.
-export([unreadable_file/1]).

scan_test_() ->
    erllama_cache_store_util:store_tests([
        fun a_start_reads_headers_only/1,
        fun a_start_removes_corrupt_files/1,
        fun a_start_keeps_later_versions/1,
        fun a_start_leaves_other_names_alone/1,
        fun a_start_leaves_directories_fifos_and_links/1,
        fun an_unreadable_file_is_not_corrupt/1,
        fun a_start_sweeps_abandoned_temporary_files/1
    ]).

a_start_reads_headers_only(Root) ->
    {Good, Bad} = with_store(#{root => Root}, fun(Store) -> {save(Store, 1), save(Store, 2)} end),
    corrupt_payload(file_of(Root, Bad)),
    with_store(#{root => Root}, fun(Store) ->
        Bytes = bytes_in(Root),
        ?assertMatch(#{files := 2, bytes := Bytes}, erllama_cache_store:info(Store)),
        ?assertMatch({ok, _, ?PAYLOAD}, erllama_cache_store:load(Store, Good)),
        ?assertEqual(
            {error, already_present}, erllama_cache_writer:save(Store, disk, meta(1), ?PAYLOAD)
        ),
        ?assertEqual({error, {corrupt, digest_mismatch}}, erllama_cache_store:load(Store, Bad))
    end).

a_start_removes_corrupt_files(Root) ->
    Key = with_store(#{root => Root}, fun(Store) -> save(Store, 1) end),
    {ok, Good} = file:read_file(file_of(Root, Key)),
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
    _ = [ok = file:write_file(file_of(Root, K), File) || {K, {_, File}} <- maps:to_list(Damaged)],
    %% Somebody may be copying them in.
    with_store(#{root => Root}, fun(Store) ->
        ?assertMatch(#{files := 9}, erllama_cache_store:info(Store)),
        ?assertEqual(10, length(files(Root)))
    end),
    LongAgo = {{2020, 1, 1}, {0, 0, 0}},
    _ = [ok = file:change_time(file_of(Root, K), LongAgo) || K <- maps:keys(Damaged)],
    Events = logged(fun() ->
        with_store(#{root => Root}, fun(Store) ->
            ?assertMatch(#{files := 1}, erllama_cache_store:info(Store))
        end)
    end),
    ?assertEqual([filename:basename(file_of(Root, Key))], files(Root)),
    Expected = [{file_of(Root, K), Reason} || {K, {Reason, _}} <- maps:to_list(Damaged)],
    Removed = [
        {File, Reason}
     || #{event := corrupt_file_removed, file := File, reason := Reason} <- Events
    ],
    ?assertEqual(lists:sort(Expected), lists:sort(Removed)).

a_start_keeps_later_versions(Root) ->
    Key = with_store(#{root => Root}, fun(Store) -> save(Store, 1) end),
    patch_file(file_of(Root, Key), 3, <<3>>),
    with_store(#{root => Root}, fun(Store) ->
        ?assertMatch(#{files := 1}, erllama_cache_store:info(Store)),
        ?assert(filelib:is_regular(file_of(Root, Key))),
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
        ?assertEqual(lists:sort(Names), files(Root))
    end).

a_start_leaves_directories_fifos_and_links(Root) ->
    {Dir, Fifo, Link} = {<<1:256>>, <<2:256>>, <<3:256>>},
    ok = file:make_dir(file_of(Root, Dir)),
    [] = os:cmd("mkfifo " ++ file_of(Root, Fifo)),
    ok = file:make_symlink("/dev/zero", file_of(Root, Link)),
    TmpDir = filename:join(Root, lists:duplicate(64, $a) ++ ".0123456789abcdef.tmp"),
    ok = file:make_dir(TmpDir),
    There = files(Root),
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
    ?assertEqual(There, files(Root)),
    Skipped = [File || #{event := file_skipped, file := File} <- Events],
    ?assertEqual(
        lists:sort([temporary_file | [file_of(Root, Key) || Key <- [Dir, Fifo, Link]]]),
        lists:sort(Skipped)
    ).

%% Root reads everything: it does this on a node that has laid that right down.
an_unreadable_file_is_not_corrupt(Root) ->
    {0, Id} = run_command("id", ["-u"]),
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
    Path = file_of(Root, Key),
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

a_start_sweeps_abandoned_temporary_files(Root) ->
    Hex = lists:duplicate(64, $a),
    [Stale, Locked] = [filename:join(Root, Hex ++ "." ++ lists:duplicate(16, C) ++ ".tmp")
                       || C <- "0f"],
    _ = [ok = file:write_file(File, <<"half a f">>) || File <- [Stale, Locked]],
    Lock = lock(Locked),
    with_store(#{root => Root}, fun(_Store) -> ok end),
    ?assertEqual([filename:basename(Locked)], files(Root)),
    ok = unlock(Lock),
    with_store(#{root => Root}, fun(_Store) -> ok end),
    ?assertEqual([], files(Root)).

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
