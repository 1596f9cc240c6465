%% Saves on disks that are full, on loan, or going away. run.sh mounts them and runs each
%% scenario in a VM of its own:
%%
%%     erl ... -s erllama_cache_disks main -extra SCENARIO ROOT...
%%
%% What is proven is printed as one line; a scenario that fails says where and ends with status 1.
-module(erllama_cache_disks).

-export([main/0]).

-include_lib("stdlib/include/assert.hrl").

-import(erllama_cache_hooked_host, [with_hook/2, stop_after_first_slice/1, go_on/1]).
-import(erllama_cache_test_util, [
    files/1, open_files/1, file_of/2, meta/1, eventually/1, actor/0, tell/2, answer/2, kill/1,
    run_command/2
]).

-define(STORE, disks_store).
-define(OTHER, disks_other_store).
-define(WRITER, erllama_cache_writer).
-define(KIB, 1024).
-define(MIB, (1 bsl 20)).

-spec main() -> no_return().
main() ->
    [Scenario, Root | Args] = init:get_plain_arguments(),
    %% What is expected to be logged here is no news.
    ok = logger:set_primary_config(level, none),
    try
        {ok, _} = ?WRITER:start_link(#{host => erllama_cache_hooked_host}),
        io:format("~ts~n", [scenario(list_to_atom(Scenario), Root, Args)]),
        halt(0)
    catch
        Class:Reason:Stack ->
            io:format("FAILED: ~p~n", [{Class, Reason, Stack}]),
            halt(1)
    end.

%%% Full

%% Whatever it is that runs out, and however large the saves are: an error says so, nothing is left
%% of those that failed, all that were told `{ok, _}' are there, and once there is room it goes on.
scenario(full, Root, [Tier, Reason]) ->
    %% First what asks for its space beforehand, then what is written in one go, down to one page.
    Sizes = [3 * ?MIB, 300 * ?KIB, 100 * ?KIB, 30 * ?KIB, 1],
    full(Root, list_to_atom(Tier), list_to_atom(Reason), Sizes);
scenario(no_inodes, Root, []) ->
    full(Root, disk, enospc, [1, 30 * ?KIB, 3 * ?MIB]);

%% What is to stay free stays free, whoever fills the file system, and what goes for it was used
%% before all that stays.
scenario(spare, Root, []) ->
    Spare = 16 * ?MIB,
    start_store(?STORE, Root, #{min_free_bytes => Spare}),
    Step = fun(N, Order) ->
        {ok, Key} = try_save(N, (1 + N rem 3) * ?MIB),
        ?assert(free_bytes(Root) >= Spare),
        Left = [Each || Each <- Order, erllama_cache_store:member(?STORE, Each)],
        ?assertEqual(lists:sublist(Order, length(Left)), Left),
        %% The next to go becomes the last.
        case Left of
            [_ | _] when N rem 4 =:= 0 ->
                Next = lists:last(Left),
                {ok, _, _} = erllama_cache_store:load(?STORE, Next),
                [Next, Key | lists:droplast(Left)];
            _ ->
                [Key | Left]
        end
    end,
    Stored = lists:foldl(Step, [], lists:seq(1, 60)),
    ?assert(length(Stored) > 10),
    %% No more of them went than had to.
    ?assert(free_bytes(Root) < Spare + 3 * ?MIB),
    Foreign = filename:join(filename:dirname(Root), "foreign"),
    ok = file:write_file(Foreign, <<0:(14 * ?MIB * 8)>>),
    ?assert(free_bytes(Root) < Spare),
    Pinned = Step(61, Stored),
    [ok = erllama_cache_store:pin(?STORE, Each) || Each <- Pinned],
    #{evictions := Evictions} = erllama_cache_store:info(?STORE),
    ?assertEqual({error, no_room}, try_save(62, 3 * ?MIB)),
    ?assertMatch(#{evictions := Evictions}, erllama_cache_store:info(?STORE)),
    io_lib:format("61 saves leave 16 MiB free, ~b files went for it, the least recently used first",
                  [Evictions]);

%% A mount that is made read-only between saves, by whoever may, and back.
scenario(read_only, Root, [Mount]) ->
    start_store(?STORE, Root, #{}),
    Keys = #{1 := Key} = maps:from_list([{N, save(N)} || N <- [1, 2]]),
    ok = file:write_file(stale_name(Root), <<"half a f">>),
    Before = files(Root),
    remount("ro", Mount),
    [?assertEqual({error, erofs}, try_save(N, Size)) || {N, Size} <- sizes(3)],
    ?assertEqual({error, already_present}, try_save(1, 1)),
    ?assertEqual({error, erofs}, erllama_cache_store:delete(?STORE, Key)),
    assert_loads(Keys),
    assert_nothing_held(Root),
    %% One can start here too: it knows the files, and cannot sweep.
    restart_store(?STORE, Root, #{}),
    ?assertMatch(#{files := 2}, erllama_cache_store:info(?STORE)),
    assert_loads(Keys),
    ?assertEqual(Before, files(Root)),
    remount("rw", Mount),
    More = maps:from_list([{N, save(N, Size)} || {N, Size} <- sizes(3)]),
    restart_store(?STORE, Root, #{}),
    assert_loads(maps:merge(Keys, More)),
    ?assertEqual(names(Root, maps:merge(Keys, More)), files(Root)),
    ok = erllama_cache_store:delete(?STORE, Key),
    "saves fail with erofs, loads go on, a store starts; after remount,rw all of it works";

%% The kernel finds an error in the file system and makes it read-only, in the middle of saves: once
%% between two slices, once between the last one and the publishing. By hand a mount cannot be made
%% read-only while a file on it is open for writing, so this is how it happens.
scenario(read_only_amid, Root, [Image, Mount]) ->
    start_store(?STORE, Root, #{}),
    Key = save(1),
    _ = [
        begin
            broken_amid(Pause, Root, Key, Mount),
            repair(Image, Mount),
            assert_loads(#{1 => Key})
        end
     || Pause <- [fun paused_in_slices/2, fun paused_before_publishing/2]
    ],
    Keys = maps:from_list([{1, Key} | [{N, save(N, Size)} || {N, Size} <- sizes(2)]]),
    assert_loads(Keys),
    ?assertEqual(names(Root, Keys), files(Root)),
    assert_nothing_held(Root),
    "erofs between two slices and before publishing, nothing left; after a repair it goes on";

%%% FUSE

%% The way without O_TMPFILE: temporary files have names and locks.
scenario(named, Root, [Under]) ->
    ?assertEqual(false, takes_unnamed(Root)),
    start_store(?STORE, Root, #{}),
    Keys = maps:from_list([{N, save(N, Size)} || {N, Size} <- sizes(1)]),
    assert_loads(Keys),
    named_save_in_the_open(Root),
    adoption(Root),
    replacement(Root, filename:join(filename:dirname(Under), "outside")),
    sweep(Root),
    named_root_moved(Root),
    assert_loads(Keys),
    [ok = erllama_cache_store:delete(?STORE, Key) || Key <- maps:values(Keys)],
    eviction(Root),
    assert_nothing_held(Root),
    "saved, loaded, adopted, replaced, evicted, swept but for a locked one, root moved away";

%%% Other file systems

%% All that is usual, on a file system that is not: whether temporary files have names there, and
%% which syncs a save makes (docs/design/save.md), is known.
scenario(usual, Root, [Names, Plan]) ->
    ?assertEqual(Names =:= "unnamed", takes_unnamed(Root)),
    start_store(?STORE, Root, #{}),
    Keys = maps:from_list([{N, save(N, Size)} || {N, Size} <- sizes(1)]),
    assert_loads(Keys),
    {Key, Calls} = calls(fun() -> save(5, 50 * ?KIB) end),
    ?assertEqual(syncs(list_to_atom(Plan)), maps:with(maps:keys(syncs(everything)), Calls)),
    adoption(Root),
    replacement(Root, filename:join(filename:dirname(Root), "outside")),
    sweep(Root),
    restart_store(?STORE, Root, #{}),
    ?assertMatch(#{files := 5}, erllama_cache_store:info(?STORE)),
    assert_loads(Keys#{5 => Key}),
    eventually(fun() -> files(Root) =:= names(Root, Keys#{5 => Key}) end),
    [ok = erllama_cache_store:delete(?STORE, K) || K <- [Key | maps:values(Keys)]],
    eviction(Root),
    assert_nothing_held(Root),
    io_lib:format("saved, loaded, adopted, replaced, swept, scanned, evicted; ~ts temporary files, "
                  "syncs: ~ts", [Names, Plan]);

%%% Loads only read

%% What an image brings along is loaded from there, notes of use being due: nothing is copied into
%% the upper layer, which has no room for it.
scenario(lower, Lower, [Upper, Work, Merged, Elsewhere]) ->
    start_store(?STORE, Lower, #{}),
    Keys = maps:from_list([{N, save_long_ago(?STORE, N, Size)} || {N, Size} <- sizes(1)]),
    Before = contents(Lower),
    ok = gen_server:stop(?STORE),
    {0, _} = run_command("mount", [
        "-t", "overlay", "overlay", Merged, "-o",
        ["lowerdir=", Lower, ",upperdir=", Upper, ",workdir=", Work]
    ]),
    start_store(?STORE, Merged, #{}),
    [assert_loads(Keys) || _ <- lists:seq(1, 3)],
    notes_are_made(Elsewhere),
    ?assertEqual([], files(Upper)),
    ?assertEqual(Before, contents(Lower)),
    Key = save(5),
    ?assertEqual([filename:basename(file_of(Merged, Key))], files(Upper)),
    assert_loads(Keys#{5 => Key}),
    assert_nothing_held(Merged),
    "loads from the lower layer, with notes of use due: nothing is copied up";

%% As for a backup or a snapshot. Loads go on, though their uses should be noted; a save waits, and
%% many leave the others what they need.
scenario(frozen, Root, [Mount, Elsewhere]) ->
    start_store(?STORE, Root, #{}),
    ok = ?WRITER:set_max_concurrent(20),
    Sizes = lists:flatten(lists:duplicate(5, [Size || {_, Size} <- sizes(1)])),
    Numbered = lists:zip(lists:seq(1, length(Sizes)), Sizes),
    Keys = maps:from_list([{N, save_long_ago(?STORE, N, Size)} || {N, Size} <- Numbered]),
    Saved = frozen(Mount, fun() ->
        First = begin_save(101),
        %% Each answers before the thaw, or this fails.
        all_answer([fun() -> assert_loads(#{N => Key}) end || {N, Key} <- maps:to_list(Keys)]),
        all_answer([look(Elsewhere) || _ <- Sizes]),
        %% More than there are turns.
        More = [begin_save(N) || N <- lists:seq(102, 120)],
        all_answer([look(Elsewhere) || _ <- Sizes]),
        [begin ?assertEqual(waits, has_answered(Save)), Save end || Save <- [First | More]]
    end),
    Late = [{N, answer(Saver, Saving)} || {N, Saver, Saving} <- Saved],
    assert_loads(maps:merge(Keys, maps:from_list([{N, Key} || {N, {ok, Key}} <- Late]))),
    ?assertEqual(20, length([Key || {_, {ok, Key}} <- Late])),
    %% What was put off has been made up for.
    [eventually(fun() -> hits(?STORE, Key) > 0 end) || Key <- maps:values(Keys)],
    assert_nothing_held(Root),
    "20 loads answer, with notes of use due, and 20 looks elsewhere; 20 saves wait for the thaw".

%% By somebody else's account.
free_bytes(Root) ->
    {0, Answer} = run_command("stat", ["-f", "-c", "%a %S", Root]),
    [Blocks, Size] = [list_to_integer(Word) || Word <- string:lexemes(Answer, " \n")],
    Blocks * Size.

full(Root, Tier, Reason, Sizes) ->
    start_store(?STORE, Root, #{tier => Tier}),
    Fill = fun(Size, Sofar) -> fill(Root, Tier, Size, Reason, Sofar) end,
    Filled = lists:foldl(Fill, #{}, Sizes),
    assert_loads(Filled),
    %% In the background too.
    {ok, Ref} = ?WRITER:save_async(?STORE, Tier, meta([0]), payload(0, 3 * ?MIB)),
    receive {?WRITER, Ref, Result} -> ?assertEqual({error, Reason}, Result) end,
    %% What is deleted is room.
    Kept = maps:fold(fun
        (N, Key, Sofar) when N rem 2 =:= 0 ->
            ok = erllama_cache_store:delete(?STORE, Key),
            maps:remove(N, Sofar);
        (_, _, Sofar) ->
            Sofar
    end, Filled, Filled),
    Again = maps:from_list([{N, save(N, 20 * ?KIB, Tier)} || N <- lists:seq(100001, 100003)]),
    assert_loads(maps:merge(Kept, Again)),
    %% A store that may take less than there is on the disk evicts, and saves never fail.
    Bytes = maps:get(bytes, erllama_cache_store:info(?STORE)),
    Bound = Bytes div 2,
    restart_store(?STORE, Root, #{tier => Tier, max_bytes => Bound}),
    Rest = [save(N, min(300 * ?KIB, Bound div 4), Tier) || N <- lists:seq(200001, 200040)],
    #{bytes := Now, evictions := Evictions} = erllama_cache_store:info(?STORE),
    ?assert(Now =< Bound),
    ?assert(Evictions > 0),
    ?assertMatch({ok, _, _}, erllama_cache_store:load(?STORE, lists:last(Rest))),
    assert_nothing_held(Root),
    io_lib:format("~b saves until ~w, nothing left; ~b deleted, saves work; ~b evicted, saves work",
                  [maps:size(Filled), Reason, maps:size(Filled) - maps:size(Kept), Evictions]).

%% Saves payloads of one size until there is no room for another one.
fill(Root, Tier, Size, Reason, Keys) ->
    N = maps:size(Keys) + 1,
    Free = free(Root),
    case ?WRITER:save(?STORE, Tier, meta([N]), payload(N, Size)) of
        {ok, Key} ->
            ?assert(N < 100000),
            fill(Root, Tier, Size, Reason, Keys#{N => Key});
        {error, Error} ->
            ?assertEqual(Reason, Error),
            assert_nothing_held(Root),
            %% FUSE hides what is removed while it is open, and removes it when it has been closed.
            eventually(fun() -> files(Root) =:= names(Root, Keys) end),
            %% Nor is a byte of the disk kept.
            eventually(fun() -> is_no_less(free(Root), Free) end),
            Keys
    end.

%% Free bytes and inodes. A name that was there for a moment may have made the directory longer, and
%% it does not shrink: that is no leak.
free(Root) ->
    {0, Said} = run_command("stat", ["-f", "-c", "%f %S %d", Root]),
    [Blocks, Size, Inodes] = [list_to_integer(Number) || Number <- string:lexemes(Said, " \n")],
    {Blocks * Size + filelib:file_size(Root), Inodes}.

is_no_less({Bytes, Inodes}, {BytesBefore, InodesBefore}) ->
    Bytes >= BytesBefore andalso Inodes >= InodesBefore.

%%% Read-only

remount(How, Mount) ->
    {0, _} = run_command("mount", ["-o", "remount," ++ How, Mount]),
    ok.

broken_amid(Pause, Root, Key, Mount) ->
    Before = files(Root),
    {0, Device} = run_command("findmnt", ["-no", "SOURCE", Mount]),
    Sys = filename:join("/sys/fs/ext4", filename:basename(string:trim(Device))),
    Result = Pause(Root, fun() ->
        ok = file:write_file(filename:join(Sys, "trigger_fs_error"), "a test")
    end),
    ?assertEqual({error, erofs}, Result),
    ?assertEqual(Before, files(Root)),
    ?assertMatch({ok, _, _}, erllama_cache_store:load(?STORE, Key)),
    [?assertEqual({error, erofs}, try_save(N, Size)) || {N, Size} <- sizes(50)],
    assert_nothing_held(Root).

%% What an operator does.
repair(Image, Mount) ->
    %% A file that has just been closed may keep the system busy for a moment.
    eventually(fun() -> element(1, run_command("umount", [Mount])) =:= 0 end),
    {Status, _} = run_command("e2fsck", ["-fy", Image]),
    ?assert(Status =< 1),
    {0, _} = run_command("mount", ["-o", "loop,errors=remount-ro", Image, Mount]),
    ok.

%% A large save, stopped after its first slice while `Meanwhile' runs.
paused_in_slices(Root, Meanwhile) ->
    Saver = actor(),
    Self = self(),
    Turns = stop_after_first_slice(fun() ->
        Self ! {saving, tell(Saver, fun() -> try_save(100, 24 * ?MIB) end)},
        Saver
    end),
    ?assertMatch([_ | _], open_files(Root ++ "/")),
    Meanwhile(),
    ok = go_on(Turns),
    receive {saving, Saving} -> answer(Saver, Saving) end.

%% A large save that is written and synced, stopped before it is published: the host is asked then
%% whether its reservation stands.
paused_before_publishing(_Root, Meanwhile) ->
    with_hook(Meanwhile, fun() -> try_save(99, 3 * ?MIB) end).

%%% FUSE

%% It is seen while it is written, locked, left alone by a start, and gone when its owner is killed.
named_save_in_the_open(Root) ->
    Before = files(Root),
    Saver = actor(),
    Result = paused_before_publishing(Root, fun() ->
        [Tmp] = files(Root) -- Before,
        ?assertEqual(".tmp", filename:extension(Tmp)),
        start_store(?OTHER, Root, #{}),
        ok = gen_server:stop(?OTHER),
        ?assertEqual([Tmp], files(Root) -- Before)
    end),
    {ok, Key} = Result,
    ?assertEqual([filename:basename(file_of(Root, Key))], files(Root) -- Before),
    ok = erllama_cache_store:delete(?STORE, Key),
    Self = self(),
    with_hook(fun() -> Self ! written, receive never -> ok end end, fun() ->
        _ = tell(Saver, fun() -> try_save(98, 3 * ?MIB) end),
        receive written -> ok end
    end),
    ?assertMatch([_], files(Root) -- Before),
    kill(Saver),
    eventually(fun() -> files(Root) =:= Before end).

adoption(Root) ->
    start_store(?OTHER, Root, #{}),
    #{adoptions := Adoptions} = ?WRITER:info(),
    {ok, Key} = ?WRITER:save(?OTHER, disk, meta([60]), payload(60, ?MIB)),
    ?assertEqual(Key, save(60, 10)),
    ?assertMatch(#{adoptions := A} when A =:= Adoptions + 1, ?WRITER:info()),
    Payload = payload(60, ?MIB),
    ?assertMatch({ok, _, Payload}, erllama_cache_store:load(?STORE, Key)),
    ok = gen_server:stop(?OTHER),
    ok = erllama_cache_store:delete(?STORE, Key).

%% A damaged file, and links to one that is somebody else's.
replacement(Root, Outside) ->
    {ok, Key} = erllama_cache_store:key(meta([70])),
    File = file_of(Root, Key),
    [
        begin
            ok = file:write_file(Outside, <<"somebody's">>),
            ok = Make(File),
            #{replacements := Before} = ?WRITER:info(),
            ?assertEqual(Key, save(70, Size)),
            ?assertMatch(#{replacements := After} when After =:= Before + 1, ?WRITER:info()),
            Payload = payload(70, Size),
            ?assertMatch({ok, _, Payload}, erllama_cache_store:load(?STORE, Key)),
            ?assertEqual({ok, <<"somebody's">>}, file:read_file(Outside)),
            ok = erllama_cache_store:delete(?STORE, Key)
        end
     || Size <- [100, 3 * ?MIB],
        Make <- [
            fun(Path) -> file:write_file(Path, <<"no KVC file at all">>) end,
            fun(Path) -> file:make_symlink(Outside, Path) end,
            fun(Path) -> file:make_symlink("nowhere", Path) end
        ]
    ],
    ok = file:delete(Outside).

sweep(Root) ->
    Before = files(Root),
    [Stale, Locked] = [stale_name(Root), stale_name(Root)],
    [ok = file:write_file(File, <<"half a f">>) || File <- [Stale, Locked]],
    Lock = open_port({spawn_executable, os:find_executable("flock")}, [
        {args, [Locked, "sh", "-c", "echo locked; read x"]}, {line, 80}, exit_status
    ]),
    receive {Lock, {data, {eol, "locked"}}} -> ok end,
    restart_store(?STORE, Root, #{}),
    ?assertEqual([filename:basename(Locked)], files(Root) -- Before),
    true = port_command(Lock, "\n"),
    receive {Lock, {exit_status, _}} -> ok end,
    restart_store(?STORE, Root, #{}),
    ?assertEqual(Before, files(Root)).

%% The root is moved away in the middle of a save and a link to another directory takes its place:
%% the save ends where it began, its temporary name with it.
named_root_moved(Root) ->
    [Dir, Moved, Trap] = [filename:join(Root, Name) || Name <- ["root", "moved", "trap"]],
    [ok = file:make_dir(D) || D <- [Dir, Trap]],
    start_store(?OTHER, Dir, #{}),
    Swap = fun() ->
        [Tmp] = files(Dir),
        ok = file:rename(Dir, Moved),
        ok = file:make_symlink(Trap, Dir),
        ok = file:write_file(filename:join(Trap, Tmp), <<"somebody's">>)
    end,
    {ok, Key} = with_hook(Swap, fun() ->
        ?WRITER:save(?OTHER, disk, meta([80]), payload(80, 3 * ?MIB))
    end),
    ?assertEqual([filename:basename(file_of(Moved, Key))], files(Moved)),
    [Tmp] = files(Trap),
    ?assertEqual({ok, <<"somebody's">>}, file:read_file(filename:join(Trap, Tmp))),
    ok = gen_server:stop(?OTHER),
    ok = file:delete(Dir),
    [ok = file:del_dir_r(D) || D <- [Moved, Trap]].

eviction(Root) ->
    restart_store(?STORE, Root, #{max_bytes => 4 * ?MIB}),
    Keys = [save(N, ?MIB) || N <- lists:seq(90, 97)],
    #{files := Files, bytes := Bytes, evictions := Evictions} = erllama_cache_store:info(?STORE),
    ?assertEqual(8, Files + Evictions),
    ?assert(Bytes =< 4 * ?MIB),
    ?assertEqual(Files, length(files(Root))),
    ?assertMatch({ok, _, _}, erllama_cache_store:load(?STORE, lists:last(Keys))).

%%% Other file systems

%% What a save of a small file makes, by the plan.
syncs(everything) ->
    #{"fdatasync" => 1, "sync_file_range_wait" => 0, "fchmod" => 1, "fsync" => 2};
syncs(one_link) ->
    #{"fdatasync" => 1, "sync_file_range_wait" => 0, "fchmod" => 0, "fsync" => 1}.

%% How often the library makes each call while `Fun' runs: proofs/faults/iofault.c counts.
calls(Fun) ->
    Before = calls(),
    Result = Fun(),
    {Result, maps:map(fun(Kind, Calls) -> Calls - map_get(Kind, Before) end, calls())}.

calls() ->
    {ok, <<_:12/unit:64, Counts:(48 * 8)/binary, Names:(48 * 24)/binary>>} =
        file:read_file(os:getenv("IOFAULT")),
    Kinds = [hd(string:split(binary_to_list(Name), "\0")) || <<Name:24/binary>> <= Names],
    maps:from_list(lists:zip(Kinds, [Count || <<Count:64/native>> <= Counts])).

%%% Loads only read

save_long_ago(Store, N, Size) ->
    LongAgo = erlang:system_time(second) - 2 * 3600,
    Meta = (meta([N]))#{last_used_time => LongAgo},
    {ok, Key} = ?WRITER:save(Store, disk, Meta, payload(N, Size)),
    Key.

hits(Store, Key) ->
    {ok, #{hit_count := Hits}, _} = erllama_cache_store:load(Store, Key),
    Hits.

contents(Dir) ->
    [{Name, file:read_file(filename:join(Dir, Name))} || Name <- files(Dir)].

%% One thread makes all notes, in their order: when this one has been made, those before it have
%% been made too, or refused.
notes_are_made(Elsewhere) ->
    start_store(?OTHER, Elsewhere, #{}),
    Key = save_long_ago(?OTHER, 1, 1),
    eventually(fun() -> hits(?OTHER, Key) > 0 end),
    ok = gen_server:stop(?OTHER).

%% By a process that is there before, and thaws it when this VM ends too: where all schedulers for
%% files wait, none can be started.
frozen(Mount, Fun) ->
    Commands = "fsfreeze -f \"$1\" && echo frozen && read x; fsfreeze -u \"$1\"",
    Freezer = open_port({spawn_executable, os:find_executable("sh")}, [
        {args, ["-c", Commands, "sh", Mount]}, {line, 80}, exit_status
    ]),
    receive {Freezer, Said} -> ?assertEqual({data, {eol, "frozen"}}, Said) end,
    try
        Fun()
    after
        true = port_command(Freezer, "\n"),
        receive {Freezer, Ended} -> ?assertEqual({exit_status, 0}, Ended) end
    end.

all_answer(Funs) ->
    Told = [{Actor, tell(Actor, Fun)} || Fun <- Funs, Actor <- [actor()]],
    [answer(Actor, Ref) || {Actor, Ref} <- Told].

look(Dir) ->
    fun() -> {ok, _} = file:read_file_info(Dir) end.

%% A large save, begun: it is in a call of the library, or waits for its turn.
begin_save(N) ->
    Saver = actor(),
    Saving = tell(Saver, fun() -> try_save(N, 300 * ?KIB) end),
    eventually(fun() ->
        {current_function, {Module, Function, _}} = process_info(Saver, current_function),
        lists:member({Module, Function}, [
            {erllama_cache_nif, write_tmp}, {erllama_cache_waiter, await_decision}
        ])
    end),
    {N, Saver, Saving}.

has_answered({_N, _Saver, Saving}) ->
    receive
        {Saving, Outcome} -> Outcome
    after 0 -> waits
    end.

%%% What all need

start_store(Name, Root, Options) ->
    {ok, _} = erllama_cache_store:start_link(Name, Options#{root => Root}),
    ok.

restart_store(Name, Root, Options) ->
    ok = gen_server:stop(Name),
    start_store(Name, Root, Options).

%% One for each way in which a save writes.
sizes(From) ->
    lists:zip(lists:seq(From, From + 3), [1, 50 * ?KIB, 200 * ?KIB, 3 * ?MIB]).

save(N) -> save(N, 20 * ?KIB).
save(N, Size) -> save(N, Size, disk).
save(N, Size, Tier) ->
    {ok, Key} = ?WRITER:save(?STORE, Tier, meta([N]), payload(N, Size)),
    Key.

try_save(N, Size) ->
    ?WRITER:save(?STORE, disk, meta([N]), payload(N, Size)).

payload(N, Size) ->
    binary:part(binary:copy(<<N:32, "not of any other number">>, Size div 27 + 1), 0, Size).

%% Each by its own bytes: its length is what is there.
assert_loads(Keys) ->
    _ = maps:map(fun(N, Key) ->
        {ok, _, Payload} = erllama_cache_store:load(?STORE, Key),
        ?assert(Payload =:= payload(N, byte_size(Payload)))
    end, Keys),
    ok.

assert_nothing_held(Root) ->
    ?assertMatch(#{current := 0, waiting := 0, inflight_bytes := 0}, ?WRITER:info()),
    ?assertMatch(#{reservations := 0}, erllama_cache_store:info(?STORE)),
    eventually(fun() -> open_files(Root) =:= [] end).

names(Root, Keys) ->
    lists:sort([filename:basename(file_of(Root, Key)) || Key <- maps:values(Keys)]).

stale_name(Root) ->
    {ok, Key} = erllama_cache_store:key(meta([erlang:unique_integer([positive])])),
    filename:rootname(file_of(Root, Key)) ++ ".0123456789abcdef.tmp".

takes_unnamed(Root) ->
    ok = erllama_cache_io_limit:setup(),
    erllama_cache_io_limit:run(fun(Turn) ->
        erllama_cache_nif:takes_unnamed(Turn, list_to_binary(Root))
    end).
