%% A root into which somebody else writes too: links, FIFOs, devices, files of others, forgeries,
%% and the root itself put elsewhere. What is outside the root is never read, written, truncated,
%% made accessible or removed through it, and what was not made with the node's secret is never
%% loaded.
-module(erllama_cache_hostile_SUITE).

-include_lib("common_test/include/ct.hrl").
-include_lib("kernel/include/file.hrl").
-include_lib("stdlib/include/assert.hrl").

-compile(export_all).

-import(erllama_cache_hooked_host, [with_hook/2, stop_after_first_slice/1, go_on/1]).
-import(erllama_cache_test_util, [
    fresh_dir/2, files/1, open_files/1, file_of/2, meta/1, eventually/1, actor/0, ask/2, tell/2,
    answer/2, kill/1, run_command/2, run_node/3, stop/1, flip/2
]).

-define(STORE, hostile_store).
-define(OTHER, hostile_other_store).
-define(WRITER, erllama_cache_writer).
-define(OURS, <<"ours">>).
-define(THEIRS, <<"theirs">>).
-define(LARGE, (3 bsl 20)).
-define(SECRET, <<7:256>>).
-define(OTHER_SECRET, <<8:256>>).
-define(DIGEST_TAG, 16#b3).

suite() ->
    [{timetrap, {seconds, 120}}].

all() ->
    [{group, Group} || {Group, _, _} <- groups()].

groups() ->
    [
        {under_final_names, [], [
            a_start_leaves_what_is_no_file,
            a_load_refuses_what_is_no_file,
            a_save_takes_its_place,
            a_save_finds_it_when_it_publishes,
            a_delete_removes_the_name_alone,
            an_eviction_removes_the_name_alone,
            a_directory_is_in_the_way_and_stays,
            a_dead_savers_file_is_not_taken_for_it
        ]},
        {under_temporary_names, [], [
            a_start_sweeps_nothing_through_them,
            a_start_sweeps_the_name_of_a_hard_link
        ]},
        {others_files, [], [
            a_hard_link_is_not_written_to,
            a_damaged_hard_link_is_replaced,
            a_damaged_hard_link_is_removed_by_a_start,
            a_file_of_another_user_is_not_written_to,
            an_immutable_file_stays,
            an_immutable_root_takes_nothing
        ]},
        {swaps, [], [
            a_name_that_changes_while_it_is_opened,
            a_root_swapped_between_two_calls,
            a_root_swapped_before_publishing,
            a_root_swapped_between_slices_of_a_save,
            a_root_swapped_between_slices_of_a_load
        ]},
        {forgeries, [], [
            a_forgery_is_not_loaded_and_is_replaced,
            a_forgery_is_replaced_when_it_was_there_first,
            a_forgery_put_there_amid_a_save_is_replaced,
            a_forgery_is_not_taken_for_a_dead_savers_file,
            a_file_made_with_the_secret_is_adopted
        ]},
        {limits, [], [
            a_file_above_the_size_limit_is_refused
        ]}
    ].

init_per_testcase(Case, Config) ->
    {ok, Writer} = ?WRITER:start_link(#{host => erllama_cache_hooked_host}),
    true = unlink(Writer),
    [{root, fresh_dir(Case, Config)}, {outside, fresh_dir(outside, Config)} | Config].

end_per_testcase(_Case, Config) ->
    _ = [stop(Name) || Name <- [?STORE, ?OTHER, ?WRITER]],
    Root = ?config(root, Config),
    _ = run_command("chattr", ["-R", "-i", Root]),
    %% Large files are closed by another thread.
    eventually(fun() -> open_files(Root) =:= [] end).

%%% Limits

%% The system would end the VM: SIGXFSZ.
a_file_above_the_size_limit_is_refused(Config) ->
    Root = ?config(root, Config),
    ?assertEqual({0, ""}, run_node("", {?MODULE, limited}, [Root])),
    ?assertEqual([], [Name || Name <- files(Root), filename:extension(Name) =:= ".tmp"]),
    ?assertMatch([_], files(Root)).

limited([Root]) ->
    {ok, _} = erllama_cache_store:start_link(?STORE, #{root => Root}),
    {ok, _} = ?WRITER:start_link(#{host => erllama_cache_store}),
    Save = fun(N, Size) -> ?WRITER:save(?STORE, disk, meta([N]), <<0:(Size * 8)>>) end,
    {ok, Key} = Save(1, 1000),
    %% Not from the start: the VM's code lies in a file of its own that is larger.
    {0, ""} = run_command("prlimit", ["--fsize=20000000", "--pid", os:getpid()]),
    [{error, efbig} = Save(2, Size) || Size <- [20_000_000, 60_000_000]],
    Prompt = (meta([3]))#{prompt_text => <<0:(8 * 20_000_000)>>},
    {error, efbig} = ?WRITER:save(?STORE, disk, Prompt, <<>>),
    {ok, _, _} = erllama_cache_store:load(?STORE, Key),
    [] = open_files(Root),
    halt(0).

%%% Under final names

a_start_leaves_what_is_no_file(Config) ->
    Root = ?config(root, Config),
    {Made, Outside} = put_under(final, things(), Config),
    Before = files(Root),
    start(?STORE, Root),
    ?assertMatch(#{files := 0, bytes := 0}, erllama_cache_store:info(?STORE)),
    ?assertEqual(Before, files(Root)),
    ?assertEqual(length(Made), length(Before)),
    assert_unchanged(Outside).

a_load_refuses_what_is_no_file(Config) ->
    start(?STORE, ?config(root, Config)),
    {Made, Outside} = put_under(final, things(), Config),
    Before = snapshot([Path || {_, _, Path} <- Made]),
    [
        ?assertEqual({Thing, {error, {corrupt, not_regular}}}, {Thing, load(N)})
     || {Thing, N, _} <- Made, _ <- [once, again]
    ],
    assert_unchanged(Before),
    assert_unchanged(Outside).

a_save_takes_its_place(Config) ->
    Root = ?config(root, Config),
    start(?STORE, Root),
    [
        begin
            {Made, Outside} = put_under(final, things() -- [directory], Config),
            [
                begin
                    ?assertEqual({Thing, {ok, key(N)}}, {Thing, save(N, Payload)}),
                    ?assertMatch({ok, #file_info{type = regular}}, file:read_link_info(Path)),
                    ?assertMatch({ok, _, Payload}, load(N))
                end
             || {Thing, N, Path} <- Made
            ],
            assert_unchanged(Outside),
            ?assertEqual(length(Made), length(files(Root))),
            [ok = erllama_cache_store:delete(?STORE, key(N)) || {_, N, _} <- Made]
        end
     || Payload <- [?OURS, rand:bytes(100_000), rand:bytes(?LARGE)]
    ].

%% The name was free when the save began.
a_save_finds_it_when_it_publishes(Config) ->
    Root = ?config(root, Config),
    Elsewhere = fresh_dir(elsewhere, Config),
    start(?STORE, Root),
    Payload = rand:bytes(?LARGE),
    [
        begin
            {[{_, 1, Made}], Outside} =
                put_under(final, [Thing], lists:keystore(root, 1, Config, {root, Elsewhere})),
            Hook = fun() -> ok = file:rename(Made, path(Root, 1)) end,
            ?assertEqual({Thing, {ok, key(1)}},
                         {Thing, with_hook(Hook, fun() -> save(1, Payload) end)}),
            ?assertMatch({ok, #file_info{type = regular}}, file:read_link_info(path(Root, 1))),
            ?assertMatch({ok, _, Payload}, load(1)),
            assert_unchanged(Outside),
            ?assertEqual([filename:basename(Made)], files(Root)),
            ok = erllama_cache_store:delete(?STORE, key(1))
        end
     || Thing <- things() -- [directory]
    ].

a_delete_removes_the_name_alone(Config) ->
    Root = ?config(root, Config),
    start(?STORE, Root),
    {Made, Outside} = put_under(final, things() -- [directory], Config),
    [?assertEqual(ok, erllama_cache_store:delete(?STORE, key(N))) || {_, N, _} <- Made],
    ?assertEqual([], files(Root)),
    assert_unchanged(Outside).

%% It took the place of a file that the store knows.
an_eviction_removes_the_name_alone(Config) ->
    Root = ?config(root, Config),
    Things = things() -- [directory],
    Kept = length(Things) + 1,
    start(?STORE, Root, #{max_bytes => Kept * 10000}),
    Payload = rand:bytes(9000),
    [{ok, _} = save(N, Payload) || N <- lists:seq(1, length(Things))],
    [ok = file:delete(path(Root, N)) || N <- lists:seq(1, length(Things))],
    {Made, Outside} = put_under(final, Things, Config),
    [{ok, _} = save(N, Payload) || N <- lists:seq(101, 100 + 2 * Kept)],
    [?assertEqual({Thing, {error, enoent}}, {Thing, file:read_link_info(Path)})
     || {Thing, _, Path} <- Made],
    assert_unchanged(Outside).

%% Neither is it removed with what is in it, nor does it stop anything else.
a_directory_is_in_the_way_and_stays(Config) ->
    Root = ?config(root, Config),
    Payload = rand:bytes(9000),
    start(?STORE, Root, #{max_bytes => 40000}),
    {ok, _} = save(1, Payload),
    ok = file:delete(path(Root, 1)),
    {[{_, 1, Path}], Outside} = put_under(final, [directory], Config),
    Inside = filename:join(Path, "file"),
    ok = file:write_file(Inside, ?THEIRS),
    [{ok, _} = save(N, Payload) || N <- lists:seq(11, 20)],
    ?assertMatch({error, _}, erllama_cache_store:delete(?STORE, key(1))),
    ?assertMatch({error, {corrupt, not_regular}}, load(1)),
    stop(?STORE),
    start(?STORE, Root),
    [?assertEqual({error, eisdir}, save(1, Any)) || Any <- [?OURS, rand:bytes(?LARGE)]],
    ?assertEqual({ok, ?THEIRS}, file:read_file(Inside)),
    assert_unchanged(Outside),
    ?assertEqual([], [Name || Name <- files(Root), filename:extension(Name) =:= ".tmp"]).

%% The server looks for a file when a saver has died.
a_dead_savers_file_is_not_taken_for_it(Config) ->
    Root = ?config(root, Config),
    start(?STORE, Root),
    [
        begin
            Saver = actor(),
            {ok, _} = ask(Saver, fun reserve/0),
            {[{_, 1, Path}], Outside} = put_under(final, [Thing], Config),
            kill(Saver),
            none_reserved(),
            ?assertMatch(#{files := 0}, erllama_cache_store:info(?STORE)),
            assert_unchanged(Outside),
            remove(Path)
        end
     || Thing <- things()
    ].

%%% Under temporary names

a_start_sweeps_nothing_through_them(Config) ->
    Root = ?config(root, Config),
    {Made, Outside} = put_under(temporary, things(), Config),
    start(?STORE, Root),
    ?assertEqual(length(Made), length(files(Root))),
    assert_unchanged(Outside).

a_start_sweeps_the_name_of_a_hard_link(Config) ->
    [Root, Outside] = [?config(Dir, Config) || Dir <- [root, outside]],
    File = filename:join(Outside, "file"),
    ok = file:write_file(File, ?THEIRS),
    Before = snapshot([File]),
    ok = file:make_link(File, temporary(Root, 1)),
    start(?STORE, Root),
    ?assertEqual([], files(Root)),
    assert_unchanged(Before).

%%% Others' files

%% Nothing tells a file with two names from one with one, so it is loaded; but its bytes may be
%% somebody else's, and so are left as they are.
a_hard_link_is_not_written_to(Config) ->
    [Root, Outside] = [?config(Dir, Config) || Dir <- [root, outside]],
    File = valid(Outside, 1, ?THEIRS),
    ok = file:change_mode(File, 8#640),
    ok = file:make_link(File, path(Root, 1)),
    Before = snapshot([File]),
    start(?STORE, Root),
    [?assertMatch({ok, #{hit_count := 0}, ?THEIRS}, load(1)) || _ <- [once, again]],
    ?assertEqual({error, already_present}, save(1, ?OURS)),
    assert_unwritten(Before),
    %% One that the store has not seen is adopted, and one that is deleted is there still.
    ok = erllama_cache_store:delete(?STORE, key(1)),
    ok = file:make_link(File, path(Root, 1)),
    ?assertEqual(1, adoptions(fun() -> {ok, _} = save(1, ?OURS) end)),
    ?assertMatch({ok, _, ?THEIRS}, load(1)),
    ok = erllama_cache_store:delete(?STORE, key(1)),
    assert_unwritten(Before).

a_damaged_hard_link_is_replaced(Config) ->
    [Root, Outside] = [?config(Dir, Config) || Dir <- [root, outside]],
    File = valid(Outside, 1, rand:bytes(100_000)),
    flip_in(File, filelib:file_size(File) - 1),
    Before = snapshot([File]),
    start(?STORE, Root),
    [
        begin
            ok = file:make_link(File, path(Root, 1)),
            ?assertMatch({error, {corrupt, _}}, load(1)),
            {ok, _} = save(1, Payload),
            ?assertMatch({ok, _, Payload}, load(1)),
            assert_unwritten(Before),
            ok = erllama_cache_store:delete(?STORE, key(1))
        end
     || Payload <- [?OURS, rand:bytes(?LARGE)]
    ].

a_damaged_hard_link_is_removed_by_a_start(Config) ->
    [Root, Outside] = [?config(Dir, Config) || Dir <- [root, outside]],
    File = filename:join(Outside, "file"),
    ok = file:write_file(File, "this is no KVC file"),
    Before = snapshot([File]),
    ok = file:make_link(File, path(Root, 1)),
    start(?STORE, Root),
    ?assertEqual([], files(Root)),
    assert_unwritten(Before).

a_file_of_another_user_is_not_written_to(Config) ->
    Root = ?config(root, Config),
    start(?STORE, Root),
    {ok, _} = save(1, ?OURS),
    {ok, #file_info{uid = Us}} = file:read_file_info(path(Root, 1)),
    case file:change_owner(path(Root, 1), Us + 1) of
        ok ->
            Before = snapshot([path(Root, 1)]),
            [?assertMatch({ok, #{hit_count := 0}, ?OURS}, load(1)) || _ <- [once, again]],
            assert_unwritten(Before),
            flip_in(path(Root, 1), 1),
            ?assertMatch({error, {corrupt, _}}, load(1)),
            {ok, _} = save(1, ?OURS),
            ?assertMatch({ok, #file_info{uid = Us}}, file:read_file_info(path(Root, 1)));
        {error, eperm} ->
            {skip, "only root can give files away"}
    end.

%% Good or bad, it cannot be removed: that is an error, and nothing else suffers from it.
an_immutable_file_stays(Config) ->
    Root = ?config(root, Config),
    Payload = rand:bytes(9000),
    start(?STORE, Root, #{max_bytes => 40000}),
    {ok, _} = save(1, Payload),
    case set_immutable(path(Root, 1)) of
        ok ->
            Bad = path(Root, 2),
            Tmp = temporary(Root, 3),
            [ok = file:write_file(Path, "this is no KVC file") || Path <- [Bad, Tmp]],
            [ok = set_immutable(Path) || Path <- [Bad, Tmp]],
            Before = snapshot([path(Root, 1), Bad, Tmp]),
            %% As the oldest, it is what room would be made of.
            [{ok, _} = save(N, Payload) || N <- lists:seq(11, 20)],
            ?assertMatch({ok, #{hit_count := 0}, Payload}, load(1)),
            ?assertEqual({error, already_present}, save(1, Payload)),
            ?assertEqual({error, eperm}, erllama_cache_store:delete(?STORE, key(1))),
            ?assertMatch({error, {corrupt, _}}, load(2)),
            [?assertEqual({error, eperm}, save(2, P)) || P <- [?OURS, rand:bytes(10000)]],
            ?assertEqual({error, eperm}, erllama_cache_store:delete(?STORE, key(2))),
            stop(?STORE),
            start(?STORE, Root),
            ?assertMatch({ok, _, Payload}, load(1)),
            ?assertEqual({error, eperm}, save(2, rand:bytes(?LARGE))),
            ?assertEqual([filename:basename(Tmp)],
                         [Name || Name <- files(Root), filename:extension(Name) =:= ".tmp"]),
            assert_unwritten(Before);
        Skip ->
            Skip
    end.

an_immutable_root_takes_nothing(Config) ->
    Root = ?config(root, Config),
    start(?STORE, Root),
    {ok, _} = save(1, ?OURS),
    case set_immutable(Root) of
        ok ->
            [
                ?assertMatch({error, Reason} when Reason =:= eperm; Reason =:= eacces, save(2, P))
             || P <- [?THEIRS, rand:bytes(?LARGE)]
            ],
            ?assertMatch({error, eperm}, erllama_cache_store:delete(?STORE, key(1))),
            ?assertMatch({ok, _, ?OURS}, load(1)),
            ?assertMatch(#{reservations := 0}, erllama_cache_store:info(?STORE)),
            {0, _} = run_command("chattr", ["-i", Root]),
            ?assertMatch({ok, _}, save(2, ?THEIRS));
        Skip ->
            Skip
    end.

set_immutable(Path) ->
    case run_command("chattr", ["+i", Path]) of
        {0, _} -> ok;
        not_found -> {skip, "no chattr"};
        {_, Output} -> {skip, "chattr +i takes root and a file system that has it: " ++ Output}
    end.

%%% What changes in the middle

%% Between the look at a name and its opening it becomes a link or a FIFO: then that is what is
%% seen, and it is neither followed nor waited for. Whoever puts it there does nothing else, so that
%% it does happen in between.
a_name_that_changes_while_it_is_opened(Config) ->
    [Root, Outside] = [?config(Dir, Config) || Dir <- [root, outside]],
    start(?STORE, Root),
    {ok, _} = save(1, ?OURS),
    Theirs = valid(Outside, 1, ?THEIRS),
    Other = filename:join(Root, "other"),
    Make = [fun() -> file:make_symlink(Theirs, Other) end, fun() -> made_by("mkfifo", [Other]) end],
    Before = snapshot([Theirs]),
    case [while_exchanged(path(Root, 1), Other, M) || M <- Make] of
        [not_found | _] ->
            {skip, "no renameat2"};
        Seen ->
            [?assertEqual([ours, {error, {corrupt, not_regular}}], Outcomes) || Outcomes <- Seen],
            assert_unchanged(Before)
    end.

while_exchanged(Path, Other, Make) ->
    ok = Make(),
    Script =
        "import ctypes, select, sys\n"
        "exchange = ctypes.CDLL(None).renameat2\n"
        "a, b = [name.encode() for name in sys.argv[1:]]\n"
        "print('begun', flush=True)\n"
        "while not select.select([sys.stdin], [], [], 0)[0]:\n"
        "    for _ in range(1000):\n"
        "        exchange(-100, a, -100, b, 2)\n",
    Python = [{args, ["-c", Script, Path, Other]}, {line, 80}, exit_status, stderr_to_stdout],
    Port = open_port({spawn_executable, os:find_executable("python3")}, Python),
    receive
        {Port, {data, {eol, "begun"}}} ->
            Outcomes = outcomes(1, []),
            true = port_command(Port, "x"),
            receive {Port, {exit_status, 0}} -> ok end,
            %% A thousand times, and so every other time.
            ok = file:delete(Other),
            Outcomes;
        {Port, {data, _}} ->
            true = port_close(Port),
            not_found
    end.

%% Of many loads; of more, where the other process has hardly run meanwhile.
outcomes(Loads, Seen) when Loads =< 10000; length(Seen) < 2, Loads =< 1000000 ->
    outcomes(Loads + 1, lists:usort([outcome(load(1)) | Seen]));
outcomes(_, Seen) ->
    Seen.

outcome({ok, _, ?OURS}) -> ours;
outcome({ok, _, Other}) -> {loaded, Other};
outcome(Other) -> Other.

%% A root's path is the operator's, and may lead through links: each call works where it leads now,
%% and what is there is met with the same distrust.
a_root_swapped_between_two_calls(Config) ->
    [Root, Outside] = [?config(Dir, Config) || Dir <- [root, outside]],
    start(?STORE, Root),
    [{ok, _} = save(N, ?OURS) || N <- [1, 2, 3]],
    Theirs = valid(Outside, 9, ?THEIRS),
    ok = file:make_symlink(Theirs, path(Outside, 1)),
    ok = file:write_file(path(Outside, 2), "this is no KVC file"),
    Before = snapshot([Theirs, path(Outside, 2)]),
    Moved = swap_root(Root, Outside),
    InMoved = snapshot([path(Moved, N) || N <- [1, 2, 3]]),
    ?assertEqual({error, {corrupt, not_regular}}, load(1)),
    ?assertMatch({error, {corrupt, _}}, load(2)),
    ?assertEqual(miss, load(3)),
    assert_unwritten(Before),
    ?assertMatch({ok, _}, save(1, ?OURS)),
    ?assertMatch({ok, #file_info{type = regular}}, file:read_link_info(path(Outside, 1))),
    ok = erllama_cache_store:delete(?STORE, key(1)),
    assert_unwritten(Before),
    assert_unchanged(InMoved),
    swap_root_back(Root, Moved),
    [?assertMatch({ok, _, ?OURS}, load(N)) || N <- [1, 2, 3]].

%% The save stays in the directory that it began in, and takes nothing from the other one.
a_root_swapped_before_publishing(Config) ->
    [Root, Outside] = [?config(Dir, Config) || Dir <- [root, outside]],
    start(?STORE, Root),
    Payload = rand:bytes(?LARGE),
    Theirs = valid(Outside, 1, ?THEIRS),
    Before = snapshot([Theirs]),
    Saved = with_hook(fun() -> swap_root(Root, Outside) end, fun() -> save(1, Payload) end),
    assert_saved_in_moved(Saved, Payload, Root, Before, Config).

a_root_swapped_between_slices_of_a_save(Config) ->
    [Root, Outside] = [?config(Dir, Config) || Dir <- [root, outside]],
    start(?STORE, Root),
    Payload = rand:bytes(8 * ?LARGE),
    Theirs = valid(Outside, 1, ?THEIRS),
    Before = snapshot([Theirs]),
    {Saver, Begin} = actor_for(fun() -> save(1, Payload) end),
    Turns = stop_after_first_slice(Begin),
    _ = swap_root(Root, Outside),
    ok = go_on(Turns),
    assert_saved_in_moved(answer(Saver), Payload, Root, Before, Config).

assert_saved_in_moved(Saved, Payload, Root, Before, Config) ->
    Outside = ?config(outside, Config),
    Moved = moved(Root),
    ?assertEqual({ok, key(1)}, Saved),
    assert_unchanged(Before),
    Name = filename:basename(path(Root, 1)),
    ?assertEqual({[Name], [Name]}, {files(Moved), files(Outside)}),
    swap_root_back(Root, Moved),
    ?assertMatch({ok, _, Payload}, load(1)).

a_root_swapped_between_slices_of_a_load(Config) ->
    [Root, Outside] = [?config(Dir, Config) || Dir <- [root, outside]],
    start(?STORE, Root),
    Payload = rand:bytes(40 * ?LARGE),
    {ok, _} = save(1, Payload),
    Theirs = valid(Outside, 1, ?THEIRS),
    Before = snapshot([Theirs]),
    {Loader, Begin} = actor_for(fun() -> load(1) end),
    Turns = stop_after_first_slice(Begin),
    Moved = swap_root(Root, Outside),
    ok = file:delete(path(Moved, 1)),
    ok = file:make_symlink(Theirs, path(Moved, 1)),
    ok = go_on(Turns),
    ?assertMatch({ok, _, Payload}, answer(Loader)),
    assert_unchanged(Before).

%% A process that does this when it is told to begin, and what tells it.
actor_for(Fun) ->
    Actor = actor(),
    Self = self(),
    {Actor, fun() -> Self ! {Actor, tell(Actor, Fun)}, Actor end}.

answer(Actor) ->
    receive {Actor, Ref} -> answer(Actor, Ref) end.

swap_root(Root, Elsewhere) ->
    ok = file:rename(Root, moved(Root)),
    ok = file:make_symlink(Elsewhere, Root),
    moved(Root).

swap_root_back(Root, Moved) ->
    ok = file:delete(Root),
    ok = file:rename(Moved, Root).

moved(Root) ->
    Root ++ ".moved".

%%% Forgeries

%% All of them hold every check that needs no secret, but for the last two.
forgeries(Root, Dir) ->
    Plain = made(Dir, #{}, 1),
    None = made(Dir, #{digest => none}, 1),
    Others = made(Dir, #{mac_key => secret(?OTHER_SECRET)}, 1),
    Genuine = made(Dir, #{mac_key => secret(?SECRET)}, 1),
    OtherKey = made(Dir, #{mac_key => secret(?SECRET)}, 2),
    [{Name, fun() -> ok = file:write_file(path(Root, 1), File) end, Reason}
     || {Name, File, Reason} <- [
        {plain_digest, Plain, unauthenticated},
        {no_digest, None, unauthenticated},
        {others_secret, Others, unauthenticated},
        {payload_and_crc_changed, with_payload(Genuine, <<"forged">>), unauthenticated},
        {said_to_be_plain, with_mode(Genuine, 0), unauthenticated},
        {digest_of_the_plain_one, with_digest(Genuine, digest(Plain)), unauthenticated},
        {of_another_key, OtherKey, {corrupt, key_mismatch}},
        {said_to_be_of_no_mode, with_mode(Genuine, 2), {corrupt, bad_tag}}
    ]].

a_forgery_is_not_loaded_and_is_replaced(Config) ->
    with_forgeries(Config, fun(Forge, Reason) ->
        Forge(),
        ?assertEqual({error, Reason}, load(1)),
        %% Found by the save too, though nobody has tried to load it.
        ?assertEqual(1, replacements(fun() -> {ok, _} = save(1, ?OURS) end)),
        ok = erllama_cache_store:delete(?STORE, key(1)),
        Forge(),
        ?assertEqual(1, replacements(fun() -> {ok, _} = save(1, ?OURS) end))
    end).

a_forgery_is_replaced_when_it_was_there_first(Config) ->
    Root = ?config(root, Config),
    with_forgeries(Config, fun(Forge, Reason) ->
        stop(?STORE),
        Forge(),
        start(?STORE, Root, #{mac_key => secret(?SECRET)}),
        ?assertEqual({error, Reason}, load(1)),
        ?assertEqual(1, replacements(fun() -> {ok, _} = save(1, ?OURS) end))
    end).

a_forgery_put_there_amid_a_save_is_replaced(Config) ->
    Payload = rand:bytes(?LARGE),
    with_forgeries(Config, fun(Forge, _Reason) ->
        Save = fun() -> {ok, _} = with_hook(Forge, fun() -> save(1, Payload) end) end,
        ?assertEqual(1, replacements(Save)),
        ?assertMatch({ok, _, Payload}, load(1)),
        ok = erllama_cache_store:delete(?STORE, key(1)),
        {ok, _} = save(1, ?OURS)
    end).

a_forgery_is_not_taken_for_a_dead_savers_file(Config) ->
    with_forgeries(Config, fun(Forge, _Reason) ->
        Saver = actor(),
        {ok, _} = ask(Saver, fun reserve/0),
        Forge(),
        kill(Saver),
        none_reserved(),
        ?assertMatch(#{files := 0}, erllama_cache_store:info(?STORE)),
        {ok, _} = save(1, ?OURS)
    end).

%% What all of the above is not to refuse.
a_file_made_with_the_secret_is_adopted(Config) ->
    [Root, Outside] = [?config(Dir, Config) || Dir <- [root, outside]],
    Genuine = made(Outside, #{mac_key => secret(?SECRET)}, 1),
    restart_writer(#{mac_key => secret(?SECRET)}),
    start(?STORE, Root, #{mac_key => secret(?SECRET)}),
    ok = file:write_file(path(Root, 1), Genuine),
    ?assertEqual(1, adoptions(fun() -> {ok, _} = save(1, ?OURS) end)),
    ?assertMatch({ok, _, ?THEIRS}, load(1)).

%% Whatever each of them comes to, in the end there is our file and loads give it.
with_forgeries(Config, Fun) ->
    [Root, Outside] = [?config(Dir, Config) || Dir <- [root, outside]],
    Forgeries = forgeries(Root, Outside),
    restart_writer(#{mac_key => secret(?SECRET)}),
    start(?STORE, Root, #{mac_key => secret(?SECRET)}),
    [
        begin
            ct:log("~p", [Name]),
            Fun(Forge, Reason),
            ?assertMatch({Name, {ok, _, ?OURS}}, {Name, load(1)}),
            ?assertEqual([filename:basename(path(Root, 1))], files(Root)),
            ok = erllama_cache_store:delete(?STORE, key(1))
        end
     || {Name, Forge, Reason} <- Forgeries
    ].

secret(Bytes) ->
    fun() -> Bytes end.

%% A file as a writer with this configuration makes it.
made(Dir, Config, N) ->
    restart_writer(Config),
    File = valid(Dir, N, ?THEIRS),
    {ok, Bytes} = file:read_file(File),
    ok = file:delete(File),
    Bytes.

%% The digest's record is the last one before the payload.
split(<<_:48/binary, Offset:64/little, Length:64/little, _/binary>> = File) ->
    <<?DIGEST_TAG, 33:32/little, _Mode, Digest:32/binary>> = binary:part(File, Offset - 38, 38),
    {binary:part(File, 0, Offset - 33), Digest, binary:part(File, Offset, Length)}.

digest(File) ->
    {_, Digest, _} = split(File),
    Digest.

with_mode(File, Mode) ->
    {Before, Digest, Payload} = split(File),
    <<Before/binary, Mode, Digest/binary, Payload/binary>>.

with_digest(File, Digest) ->
    {Before, _, Payload} = split(File),
    <<Before/binary, 1, Digest/binary, Payload/binary>>.

%% One of the same length, with its checksum.
with_payload(File, Payload) ->
    {Before, Digest, Old} = split(File),
    ?assertEqual(byte_size(Old), byte_size(Payload)),
    <<Header:64/binary, _Crc:32, Rest/binary>> = Before,
    <<Header/binary, (crc32c(Payload)):32/little, Rest/binary, 1, Digest/binary, Payload/binary>>.

crc32c(Bytes) ->
    lists:foldl(fun(Byte, Crc) -> crc32c(8, Crc bxor Byte) end, 16#ffffffff,
                binary_to_list(Bytes)) bxor 16#ffffffff.

crc32c(0, Crc) -> Crc;
crc32c(N, Crc) when Crc band 1 =:= 1 -> crc32c(N - 1, (Crc bsr 1) bxor 16#82f63b78);
crc32c(N, Crc) -> crc32c(N - 1, Crc bsr 1).

%%% What stands where a file should

things() ->
    [link_to_a_valid_file, link_to_another_file, link_to_a_directory, relative_link, dangling_link,
     looping_link, link_to_a_device, fifo, socket, directory] ++
    [device || string:trim(os:cmd("id -u")) =:= "0"].

%% Each under a name of its own, numbered from 1; and what is outside, as it is now.
put_under(Kind, Things, Config) ->
    [Root, Outside] = [?config(Dir, Config) || Dir <- [root, outside]],
    Made = [
        begin
            Path = case Kind of
                final -> path(Root, N);
                temporary -> temporary(Root, N)
            end,
            ok = put_there(Thing, Path, N, Outside),
            {Thing, N, Path}
        end
     || {N, Thing} <- lists:zip(lists:seq(1, length(Things)), Things)
    ],
    {Made, snapshot([filename:join(Outside, Name) || Name <- files(Outside)])}.

put_there(link_to_a_valid_file, Path, N, Outside) ->
    file:make_symlink(valid(Outside, N, ?THEIRS), Path);
put_there(link_to_another_file, Path, _N, Outside) ->
    File = filename:join(Outside, "file"),
    ok = file:write_file(File, ?THEIRS),
    file:make_symlink(File, Path);
put_there(link_to_a_directory, Path, _N, Outside) ->
    file:make_symlink(Outside, Path);
put_there(relative_link, Path, N, Outside) ->
    File = valid(Outside, N, ?THEIRS),
    Up = filename:join(["..", filename:basename(Outside), filename:basename(File)]),
    ok = file:make_symlink(Up, Path),
    {ok, _} = file:read_file_info(Path),
    ok;
put_there(dangling_link, Path, _N, Outside) ->
    file:make_symlink(filename:join(Outside, "nothing"), Path);
put_there(looping_link, Path, _N, _Outside) ->
    file:make_symlink(filename:basename(Path), Path);
put_there(link_to_a_device, Path, _N, _Outside) ->
    file:make_symlink("/dev/zero", Path);
put_there(fifo, Path, _N, _Outside) ->
    made_by("mkfifo", [Path]);
put_there(socket, Path, _N, _Outside) ->
    made_by("python3", ["-c", "import os, stat, sys; os.mknod(sys.argv[1], stat.S_IFSOCK | 0o600)",
                        Path]);
put_there(device, Path, _N, _Outside) ->
    %% /dev/zero
    made_by("mknod", [Path, "c", "1", "5"]);
put_there(directory, Path, _N, _Outside) ->
    file:make_dir(Path).

made_by(Command, Args) ->
    {0, _} = run_command(Command, Args),
    ok.

remove(Path) ->
    case file:read_link_info(Path) of
        {ok, #file_info{type = directory}} -> ok = file:del_dir(Path);
        {ok, _} -> ok = file:delete(Path)
    end.

%% A file of this key in another directory, by a store there.
valid(Dir, N, Payload) ->
    _ = file:delete(path(Dir, N)),
    {ok, Pid} = erllama_cache_store:start_link(?OTHER, #{root => Dir}),
    {ok, Key} = ?WRITER:save(?OTHER, disk, meta([N]), Payload),
    ok = gen_server:stop(Pid),
    file_of(Dir, Key).

-record(look, {
    type :: atom(), mode :: non_neg_integer(), uid :: non_neg_integer(), contents :: term(),
    written :: term(), read :: term()
}).

%% What files are like. They were last used long ago, so that a file system that notes reads only
%% now and then notes the next one.
snapshot(Paths) ->
    [{Path, look_at(Path)} || Path <- Paths].

look_at(Path) ->
    {ok, #file_info{type = Type} = Info} = file:read_link_info(Path),
    Contents = case Type of
        regular -> file:read_file(Path);
        symlink -> file:read_link(Path);
        _ -> none
    end,
    LongAgo = {{2001, 2, 3}, {4, 5, 6}},
    %% An immutable one stays as it is.
    _ = [file:change_time(Path, LongAgo, LongAgo) || Type =:= regular],
    {Read, Written} = times(Path),
    #look{type = Type, mode = Info#file_info.mode, uid = Info#file_info.uid, contents = Contents,
          written = Written, read = Read}.

times(Path) ->
    {ok, #file_info{atime = Read, mtime = Written}} = file:read_link_info(Path),
    {Read, Written}.

%% Not even read.
assert_unchanged(Snapshot) ->
    [?assertEqual({Path, Read}, {Path, element(1, times(Path))})
     || {Path, #look{type = regular, read = Read}} <- Snapshot],
    assert_unwritten(Snapshot).

assert_unwritten(Snapshot) ->
    [
        begin
            ?assertEqual({Path, Before#look.written}, {Path, element(2, times(Path))}),
            ?assertEqual({Path, Before#look{read = any}}, {Path, (look_at(Path))#look{read = any}})
        end
     || {Path, Before} <- Snapshot
    ],
    ok.

%%% What all need

start(Name, Root) ->
    start(Name, Root, #{}).

start(Name, Root, Options) ->
    {ok, Pid} = erllama_cache_store:start_link(Name, Options#{root => Root}),
    true = unlink(Pid),
    ok.

restart_writer(Config) ->
    stop(?WRITER),
    {ok, Writer} = ?WRITER:start_link(Config#{host => erllama_cache_hooked_host}),
    true = unlink(Writer),
    ok.

save(N, Payload) ->
    ?WRITER:save(?STORE, disk, meta([N]), Payload).

reserve() ->
    erllama_cache_store:reserve(?STORE, disk, key(1), 100).

none_reserved() ->
    eventually(fun() -> maps:get(reservations, erllama_cache_store:info(?STORE)) =:= 0 end).

load(N) ->
    erllama_cache_store:load(?STORE, key(N)).

key(N) ->
    {ok, Key} = erllama_cache_store:key(meta([N])),
    Key.

path(Root, N) ->
    file_of(Root, key(N)).

temporary(Root, N) ->
    filename:rootname(path(Root, N)) ++ ".0123456789abcdef.tmp".

flip_in(Path, At) ->
    {ok, File} = file:read_file(Path),
    ok = file:write_file(Path, flip(File, At)).

adoptions(Fun) -> counted(adoptions, Fun).
replacements(Fun) -> counted(replacements, Fun).

counted(What, Fun) ->
    #{What := Before} = ?WRITER:info(),
    _ = Fun(),
    #{What := After} = ?WRITER:info(),
    After - Before.
