%% Every I/O call fails once, and the VM ends at every I/O call: what run.sh runs.
%%
%% A VM into which iofault.c is preloaded goes through all operations that touch files. For
%% each kind of call that one makes, each error and each n, the n-th such call fails, or moves half
%% of what it should, or other bytes; then the promises of docs/durability.md are looked for from
%% outside: the directory's names, descriptors, slots and reservations, what a load gives, what the
%% next save does. The second part ends a VM of its own (the victim) before and after each call, and
%% looks at what is left.
%%
%% An operation in one of its circumstances is a case: `save_small/adopt/disk' is a small save in
%% tier disk that finds a valid file of its key. The same with a call, its number and what it does
%% says what is needed to see a result again: `save_small/adopt/disk linkat 1 eio'.
%%
%% Saves behind their callers are cases, too: `save_small/adopt/disk/behind'. One that was answered
%% `{ok, Key}' and then dropped has failed, and must have been logged and counted once. After a
%% flush the promises are the same as for a save in line.
-module(erllama_cache_faults).

-export([main/0]).

-define(STORE, faults_store).
%% What it fetches from: a peer on the same node.
-define(LENDER, faults_lender).
-define(GROUP, faults_group).
-define(DEADLINE, 20000).
-define(SLOTS, 4).

%% As in iofault.c.
-define(WORD_COUNTS, 12).
-define(MOST_KINDS, 48).
-define(NAME_SIZE, 24).
-define(ANY, 255).
-define(CRASHED, 111).
-define(FOREVER, 16#ffffffffffffffff).

-define(ERRORS, [{eio, 5}, {eintr, 4}, {emfile, 24}, {enospc, 28}, {erofs, 30}, {edquot, 122}]).
%% Where a file is looked for once more: a distributed file system has lost it.
-define(STALE, {estale, 116}).

%% Up to 64 KiB a save is one call of the library, up to 256 KiB one write; this is written in
%% blocks and pieces, after its space has been reserved.
-define(LARGE, (17 bsl 18)).
%% A file of so many holes is checked before memory is taken for it.
-define(HOLES, (66 bsl 20)).
%% Where each call costs a VM.
-define(LARGE_FOR_CRASHES, (1200 bsl 10)).

-record(case_, {
    op :: save | fetch | load | evict | scan | delete | check | present,
    size = small :: small | large | holes,
    way = plain :: way(),
    %% `text' has keys made of text, and files of version 2.
    variant = disk :: disk | ram_file | keyed | options | text,
    %% Whether a save goes on behind its caller.
    behind = false :: boolean()
}).
%% What a save finds: nothing, a valid file of its key, one that is corrupt or, where keys are of
%% text, of version 1; where files can have no name only from now on, or never could.
-type way() :: plain | adopt | replace | named | named_adopt | named_replace | named_first.

-record(fault, {
    kind :: string() | any | none,
    first :: non_neg_integer(),
    last :: non_neg_integer(),
    action :: atom()
}).
-define(NO_FAULT, #fault{kind = none, first = 0, last = 0, action = short}).

%% What a case works in.
-record(world, {
    case_ :: #case_{},
    root :: string(),
    key :: binary(),
    %% The good files by their names, as they were when they were new.
    good = #{} :: #{string() => binary()},
    ours :: binary(),
    theirs :: binary(),
    %% What stands under the key's name before.
    before = none :: none | binary()
}).

%%% From outside

main() ->
    logger:set_primary_config(level, none),
    %% The victims inherit it.
    _ = os:getenv("FAULTS_LAST_USE") =:= false andalso
        os:putenv("FAULTS_LAST_USE", integer_to_list(erlang:system_time(second))),
    process_flag(trap_exit, true),
    try run(init:get_plain_arguments()) of
        true -> halt(0);
        false -> halt(1)
    catch
        Class:Reason:Stack ->
            io:format("~s:~n~p~n~p~n", [Class, Reason, Stack]),
            halt(2)
    end.

run(["faults", Base, Amount | Only]) ->
    faults(Base, list_to_existing_atom(Amount), Only);
run(["crashes", Base, Amount | Only]) ->
    crashes(Base, list_to_existing_atom(Amount), Only);
run(["victim", Root, Case, First, Action]) ->
    victim(Root, case_of(Case), list_to_integer(First), list_to_existing_atom(Action)).

%%% Which cases

cases(quick) ->
    [saving(small, Way, disk) || Way <- ways()] ++
        [saving(small, replace, options), saving(small, plain, ram_file)] ++
        [saving(large, plain, disk), saving(large, named_replace, disk)] ++
        [saving(small, Way, text) || Way <- [plain, adopt, replace, named_replace]] ++
        [saving(large, plain, text)] ++
        [behind(small, Way, disk) || Way <- [plain, adopt, replace]] ++
        [behind(large, plain, disk), behind(small, plain, text)] ++
        [#case_{op = Op, size = Size} || Op <- [load, fetch], Size <- [small, large]] ++
        [#case_{op = Op} || Op <- [evict, scan, delete, check, present]] ++
        [#case_{op = Op, variant = text} || Op <- [load, evict, scan]];
cases(full) ->
    [
        saving(Size, Way, Variant)
     || Size <- [small, large], Variant <- [disk, ram_file, keyed, options, text], Way <- ways(),
        Size =:= small orelse is_enough(Way, Variant)
    ] ++
        [behind(small, Way, disk) || Way <- ways()] ++
        [behind(small, Way, text) || Way <- [plain, adopt, replace, named_replace]] ++
        [behind(small, plain, Variant) || Variant <- [ram_file, keyed]] ++
        [behind(large, Way, disk) || Way <- [plain, adopt, replace, named_replace]] ++
        [behind(large, plain, text)] ++
        [
            #case_{op = Op, size = Size, variant = Variant}
         || Op <- [load, fetch], Size <- [small, large], Variant <- [disk, ram_file, keyed, text]
        ] ++
        [#case_{op = load, size = holes}] ++
        [
            #case_{op = Op, variant = Variant}
         || Op <- [evict, scan], Variant <- [disk, keyed, text]
        ] ++
        [#case_{op = Op, size = Size} || Op <- [delete, check, present], Size <- [small, large]].

%% Large saves take their time, and what they share with small ones those show.
is_enough(named_first, _Variant) -> false;
is_enough(_Way, disk) -> true;
is_enough(Way, ram_file) -> Way =:= plain orelse Way =:= named_replace;
is_enough(Way, options) -> Way =:= plain;
is_enough(Way, text) -> Way =:= plain orelse Way =:= replace;
is_enough(_Way, keyed) -> false.

crash_cases(quick) ->
    [saving(small, plain, disk), saving(small, named_replace, disk)] ++
        [saving(small, replace, text), behind(small, plain, disk)] ++
        [#case_{op = Op} || Op <- [fetch, evict, scan]];
crash_cases(full) ->
    [saving(small, Way, disk) || Way <- ways()] ++
        [saving(large, Way, disk) || Way <- ways(), is_enough(Way, disk)] ++
        [saving(small, plain, ram_file), saving(small, replace, options)] ++
        [saving(small, Way, text) || Way <- [plain, adopt, replace, named_replace]] ++
        [saving(large, plain, text)] ++
        [behind(small, Way, disk) || Way <- [plain, adopt, replace, named_replace]] ++
        [behind(small, replace, text), behind(large, plain, disk)] ++
        [#case_{op = fetch, size = Size} || Size <- [small, large]] ++
        [#case_{op = Op} || Op <- [evict, scan, delete]] ++
        [#case_{op = Op, variant = text} || Op <- [fetch, evict, scan]].

saving(Size, Way, Variant) ->
    #case_{op = save, size = Size, way = Way, variant = Variant}.

behind(Size, Way, Variant) ->
    (saving(Size, Way, Variant))#case_{behind = true}.

ways() ->
    [plain, adopt, replace, named, named_adopt, named_replace, named_first].

name(#case_{op = Op, size = Size, way = Way, variant = Variant, behind = Behind}) ->
    lists:concat([Op, "_", Size, "/", Way, "/", Variant] ++ ["/behind" || Behind]).

case_of(Name) ->
    Cases = lists:usort(cases(full) ++ crash_cases(full) ++ cases(quick)),
    case [Case || Case <- Cases, name(Case) =:= Name] of
        [Case] -> Case;
        [] -> error({no_such_case, Name, [name(Case) || Case <- Cases]})
    end.

is_named(#case_{way = Way}) ->
    lists:member(Way, [named, named_adopt, named_replace, named_first]).

finds(Way) when Way =:= adopt; Way =:= named_adopt -> valid;
finds(Way) when Way =:= replace; Way =:= named_replace -> corrupt;
finds(_) -> nothing.

%%% The shim

control() ->
    case os:getenv("IOFAULT") of
        false -> error("the shim is not preloaded: use proofs/faults/run.sh");
        Path -> Path
    end.

with_control(Fun) ->
    {ok, File} = file:open(control(), [read, write, raw, binary]),
    try
        Fun(File)
    after
        file:close(File)
    end.

words(Words) ->
    <<<<Word:64/native>> || Word <- Words>>.

%% The names of all kinds, with their numbers.
kinds() ->
    with_control(fun(File) ->
        {ok, Names} = file:pread(File, 8 * (?WORD_COUNTS + ?MOST_KINDS), ?MOST_KINDS * ?NAME_SIZE),
        All = [Name || <<Name:?NAME_SIZE/binary>> <= Names],
        [
            {hd(string:split(binary_to_list(Name), [0])), Number}
         || {Number, <<C, _/binary>> = Name} <- lists:zip(lists:seq(0, length(All) - 1), All), C > 0
        ]
    end).

%% Everything is forgotten that has been counted.
arm(#fault{kind = Kind, first = First, last = Last, action = Action}, Named) ->
    {Does, Error} = action(Action),
    Number = case Kind of
        any -> ?ANY;
        none -> 0;
        _ -> proplists:get_value(Kind, kinds())
    end,
    with_control(fun(File) ->
        Counts = lists:duplicate(?WORD_COUNTS - 6 + ?MOST_KINDS, 0),
        ok = file:pwrite(File, 8, words([First, Last, Does, Error, mode(Named) | Counts])),
        ok = file:pwrite(File, 0, words([Number]))
    end).

mode(true) -> 1;
mode(false) -> 0.

action(short) -> {2, 0};
action(exit_before) -> {3, 0};
action(exit_after) -> {4, 0};
action(garbled) -> {5, 0};
action(Error) -> {1, proplists:get_value(Error, [?STALE | ?ERRORS])}.

%% Ends the fault, and tells what came of it.
disarm() ->
    with_control(fun(File) ->
        ok = file:pwrite(File, 0, words([0])),
        {ok, Bytes} = file:pread(File, 0, 8 * (?WORD_COUNTS + ?MOST_KINDS)),
        [_, _, _, _, _, _, Hits, HitKind, Total, Resyncs, _, _ | Counts] =
            [Word || <<Word:64/native>> <= Bytes],
        #{
            hits => Hits,
            total => Total,
            resyncs => Resyncs,
            hit_kind => proplists:get_value(HitKind, [{N, K} || {K, N} <- kinds()], none),
            counts => maps:from_list([{K, lists:nth(N + 1, Counts)} || {K, N} <- kinds()])
        }
    end).

no_fault(Named) ->
    arm(?NO_FAULT, Named).

%%% A case's world

setup(#case_{op = Op, size = Size} = Case, Root, Large) ->
    ok = file:make_dir(Root),
    stop_writer(),
    {ok, _} = erllama_cache_writer:start_link(writer_config(Case)),
    [Ours, Theirs] = case Size of
        small -> [payload(Seed, 4096) || Seed <- [1, 2]];
        large -> [payload(Seed, Large) || Seed <- [1, 2]];
        holes -> [<<0:?HOLES/unit:8>>, payload(2, 4096)]
    end,
    World = #world{case_ = Case, root = Root, key = key(Case, 1), ours = Ours, theirs = Theirs},
    %% What the way there makes no difference to: files without a name are taken for granted.
    no_fault(is_named(Case) andalso Case#case_.way =/= named_first),
    {ok, _} = start_store(World),
    Others = case Op of
        scan -> [{file_name(key(Case, N)), template(World, meta(N), Ours)} || N <- [2, 3]];
        _ -> []
    end,
    Good = [
        {ours, template(World, meta(1), Ours)}, {theirs, template(World, meta(1), Theirs)} | Others
    ],
    no_fault(is_named(Case)),
    Complete = World#world{good = maps:from_list(Good)},
    case Op of
        scan -> stop_store();
        fetch -> ok = start_lender(Complete);
        _ -> ok
    end,
    Complete.

%% It has the file that is fetched.
start_lender(#world{root = Root, key = Key, good = #{ours := Ours}} = World) ->
    stop(?LENDER),
    Lent = filename:join(filename:dirname(Root), "lent_" ++ filename:basename(Root)),
    ok = file:make_dir(Lent),
    write(Lent, file_name(Key), Ours),
    {ok, _} = erllama_cache_store:start_link(?LENDER, (store_options(World))#{root => Lent}),
    ok.

teardown() ->
    stop(?LENDER),
    stop_store(),
    stop_writer().

writer_config(#case_{variant = Variant, behind = Behind}) ->
    WriteBehind = case Behind of
        true -> #{};
        false -> off
    end,
    Config = #{
        host => erllama_cache_store, max_concurrent => ?SLOTS, write_behind => WriteBehind
    },
    case Variant of
        options -> Config#{file_mode => 8#640, page_cache => drop};
        keyed -> Config#{mac_key => fun secret/0};
        _ -> Config
    end.

secret() ->
    binary:copy(<<7>>, 32).

start_store(World) ->
    erllama_cache_store:start_link(?STORE, store_options(World)).

store_options(#world{root = Root, case_ = #case_{op = Op, variant = Variant}}) ->
    maps:merge(
        #{root => Root, tier => tier(Variant), keyed_by => keyed_by(Variant)},
        maps:from_list(
            [{mac_key, fun secret/0} || Variant =:= keyed] ++
                [{max_bytes, 3 * 4096 + 3 * 512} || Op =:= evict] ++
                [{min_free_bytes, 1} || Op =:= evict] ++
                [{peers, ?GROUP} || Op =:= fetch] ++ [{peer_timeout, 5000} || Op =:= fetch]
        )
    ).

tier(ram_file) -> ram_file;
tier(_) -> disk.

keyed_by(text) -> text;
keyed_by(_) -> tokens.

stop_store() ->
    stop(?STORE).

stop_writer() ->
    stop(erllama_cache_writer).

stop(Name) ->
    case whereis(Name) of
        undefined ->
            ok;
        Pid ->
            gen_server:stop(Pid),
            receive {'EXIT', Pid, _} -> ok end
    end.

%% The times are given, so that the same save makes the same file in each VM; the last use is no
%% hour ago, so that no load has one noted, which another thread would do at some time.
meta(N) ->
    (erllama_cache_test_util:meta([N, 2, 3]))#{
        prompt_text => <<"prompt ", (integer_to_binary(N))/binary>>,
        creation_time => 1700000000, last_used_time => list_to_integer(os:getenv("FAULTS_LAST_USE"))
    }.

key(#case_{variant = Variant}, N) ->
    {ok, Key} = erllama_cache_store:key(meta(N), #{keyed_by => keyed_by(Variant)}),
    Key.

payload(Seed, Length) ->
    {Bytes, _} = rand:bytes_s(Length, rand:seed_s(exsss, Seed)),
    Bytes.

file_name(Key) ->
    string:lowercase(binary_to_list(binary:encode_hex(Key))) ++ ".kvc".

tmp_name(Key) ->
    string:lowercase(binary_to_list(binary:encode_hex(Key))) ++ ".0123456789abcdef.tmp".

save(#world{case_ = #case_{behind = true}} = World, Meta, Payload) ->
    save_behind(fun() -> {answer(World, Meta, Payload), as_it_should_be} end);
save(World, Meta, Payload) ->
    answer(World, Meta, Payload).

answer(#world{case_ = #case_{variant = Variant}}, Meta, Payload) ->
    erllama_cache_writer:save(?STORE, tier(Variant), Meta, Payload, 5000).

%% A save behind its caller whose slot is free only after a load. So all that the save does comes
%% after its answer, and the load is one from memory.
save_and_load(World, Meta, Payload) ->
    save_behind(fun() ->
        ok = erllama_cache_writer:acquire(infinity, #{weight => ?SLOTS}),
        try answer(World, Meta, Payload) of
            {ok, Key} = Answer -> {Answer, pending(Key, Payload)};
            Answer -> {Answer, as_it_should_be}
        after
            erllama_cache_writer:release()
        end
    end).

pending(Key, Payload) ->
    #{pending := Pending, pending_bytes := Bytes} = erllama_cache_writer:info(),
    case {Pending, Bytes, loads(Key, Payload)} of
        {1, Length, true} when Length =:= byte_size(Payload) -> as_it_should_be;
        Other -> Other
    end.

%% What a save behind its caller comes to when a flush has returned: the answer, or the failure that
%% was logged and counted, which must have happened once. Anything else is no result of a save.
save_behind(Save) ->
    #{dropped := Before} = erllama_cache_writer:info(),
    {{Answer, Pending}, Flushed} = erllama_cache_test_util:with_log(fun() ->
        {Save(), erllama_cache_writer:flush(infinity)}
    end),
    #{dropped := After} = erllama_cache_writer:info(),
    case {Answer, Pending, Flushed, failures(), After - Before} of
        {{ok, Key}, as_it_should_be, ok, [], 0} -> {ok, Key};
        {{ok, Key}, as_it_should_be, ok, [{Key, Reason}], 1} -> failure(Reason);
        {{error, _}, as_it_should_be, ok, [], 0} -> Answer;
        Other -> {behind, Other}
    end.

%% The keys and reasons of the saves that were logged as failed.
failures() ->
    receive
        {logged, error, #{event := save_dropped, key := Hex, reason := Reason}} ->
            [{binary:decode_hex(Hex), Reason} | failures()];
        {logged, _Level, _Report} ->
            failures()
    after 0 ->
        []
    end.

failure({raised, _Class, _Reason, _Stack} = Raised) -> Raised;
failure({saver_died, _Reason} = Died) -> Died;
failure(Reason) -> {error, Reason}.

%% The file that a save makes, which does not stay.
template(#world{root = Root} = World, Meta, Payload) ->
    {ok, Key} = save(World, Meta, Payload),
    Bytes = read(Root, file_name(Key)),
    ok = erllama_cache_store:delete(?STORE, Key),
    Bytes.

%% A file that no load accepts under this name. Keys of text have files of version 2 only.
spoilt(#world{case_ = #case_{variant = text}, good = #{theirs := Theirs}}) ->
    <<"KVC", 2, Rest/binary>> = Theirs,
    <<"KVC", 1, Rest/binary>>;
spoilt(#world{good = #{theirs := Theirs}}) ->
    flip_last(Theirs).

flip_last(Bytes) ->
    Length = byte_size(Bytes) - 1,
    <<Head:Length/binary, Last>> = Bytes,
    <<Head/binary, (Last bxor 1)>>.

read(Root, Name) ->
    {ok, Bytes} = prim_file:read_file(filename:join(Root, Name)),
    Bytes.

write(Root, Name, Bytes) ->
    ok = prim_file:write_file(filename:join(Root, Name), Bytes).

names(Root) ->
    {ok, Names} = prim_file:list_dir(Root),
    lists:sort(Names).

%% What this VM has open in a root, or a root itself.
descriptors(Root) ->
    {ok, Open} = prim_file:list_dir("/proc/self/fd"),
    [
        Path
     || N <- Open, {ok, Path} <- [prim_file:read_link_all("/proc/self/fd/" ++ N)],
        string:prefix(path(Path), Root) =/= nomatch
    ].

path(Path) when is_binary(Path) -> binary_to_list(Path);
path(Path) -> Path.

%%% One run

%% Puts everything where a run begins.
prepare(#world{case_ = #case_{op = save, way = Way}} = World) ->
    #world{root = Root, key = Key, good = #{theirs := Theirs}} = World,
    Before = case finds(Way) of
        nothing -> none;
        valid -> Theirs;
        corrupt -> spoilt(World)
    end,
    _ = [write(Root, file_name(Key), Before) || Before =/= none],
    World#world{before = Before};
prepare(#world{case_ = #case_{op = fetch}} = World) ->
    World;
prepare(#world{case_ = #case_{op = evict}} = World) ->
    _ = [{ok, _} = save(World, meta(N), World#world.ours) || N <- [2, 3, 4]],
    World;
prepare(#world{case_ = #case_{op = scan}, root = Root, key = Key, good = Good} = World) ->
    #{theirs := Theirs} = Good,
    _ = [write(Root, Name, Bytes) || {Name, Bytes} <- maps:to_list(Good), is_list(Name)],
    %% Its length is not what it says, and nobody is copying it here any more.
    write(Root, file_name(Key), <<Theirs/binary, 0>>),
    ok = file:change_time(filename:join(Root, file_name(Key)), {{2020, 1, 1}, {0, 0, 0}}),
    write(Root, tmp_name(Key), <<"begun">>),
    write(Root, "README", <<"not a file of ours">>),
    World;
prepare(#world{case_ = #case_{op = load, size = holes}} = World) ->
    #world{root = Root, key = Key, good = #{ours := Ours}} = World,
    %% All that is not a hole.
    write(Root, file_name(Key), binary:part(Ours, 0, byte_size(Ours) - ?HOLES)),
    {ok, File} = file:open(filename:join(Root, file_name(Key)), [read, write, raw, binary]),
    {ok, _} = file:position(File, byte_size(Ours)),
    ok = file:truncate(File),
    ok = file:close(File),
    World#world{before = Ours};
prepare(#world{} = World) ->
    {ok, _} = save(World, meta(1), World#world.ours),
    World#world{before = maps:get(ours, World#world.good)}.

perform(#world{case_ = #case_{op = Op, behind = Behind}, key = Key, ours = Ours} = World) ->
    try
        case Op of
            save when Behind -> save_and_load(World, meta(1), Ours);
            save -> save(World, meta(1), Ours);
            evict -> save(World, meta(1), Ours);
            present -> save(World, meta(1), Ours);
            fetch -> fetch(Key);
            load -> erllama_cache_store:load(?STORE, Key);
            delete -> erllama_cache_store:delete(?STORE, Key);
            check -> check(World);
            scan -> scan(World)
        end
    catch
        Class:Reason:Stack -> {raised, Class, Reason, Stack}
    end.

%% A peer's file that does not arrive is a miss, whatever the reason: the next peer is asked.
fetch(Key) ->
    case erllama_cache_peers:fetch(?STORE, Key) of
        ok -> {ok, Key};
        miss -> {error, miss};
        {error, _} = Error -> Error
    end.

%% As the store's server does when a saving process has died.
check(#world{root = Root, key = Key, case_ = #case_{variant = disk}}) ->
    Begin = fun(Turn) -> erllama_cache_nif:check(Turn, list_to_binary(Root), Key, none) end,
    case erllama_cache_io_limit:run(Begin) of
        {more, Check} -> check_more(Check);
        Result -> Result
    end.

check_more(Check) ->
    case erllama_cache_io_limit:run(fun(Turn) -> erllama_cache_nif:check_more(Turn, Check) end) of
        more -> check_more(Check);
        Result -> Result
    end.

scan(World) ->
    case start_store(World) of
        {ok, Pid} -> {ok, Pid};
        {error, Reason} ->
            receive {'EXIT', _, Reason} -> {error, Reason} end
    end.

%% Runs with a fault, and returns what the shim has to say with all that is wrong.
attempt(World0, Fault) ->
    World = prepare(World0),
    Root = World#world.root,
    quiet(Root),
    Before = names(Root),
    arm(Fault, is_named(World#world.case_)),
    Result = perform(World),
    Left = left_open(Root),
    Report = disarm(),
    After = names(Root),
    Writer = erllama_cache_writer:info(),
    Wrong = lists:append([
        [{descriptors_left, Left} || Left =/= []],
        [{slots_held, N} || #{current := N} <- [Writer], N =/= 0],
        [{pending_left, N} || #{pending := N} <- [Writer], N =/= 0],
        [{synced_again_after_a_failure, N} || #{resyncs := N} <- [Report], N =/= 0],
        reservations(World, Result),
        judge(World, Fault, Report, Result, Before, After),
        recover(World, Fault, Result)
    ]),
    {Report, class(Result), [{result, brief(Result)} || Wrong =/= []] ++ Wrong}.

quiet(Root) ->
    erllama_cache_test_util:eventually(fun() -> descriptors(Root) =:= [] end).

%% A large file is closed by another thread; what is not by now will never be.
left_open(Root) ->
    left_open(Root, erlang:monotonic_time(millisecond) + ?DEADLINE).

left_open(Root, Deadline) ->
    case descriptors(Root) of
        [] ->
            [];
        Left ->
            case erlang:monotonic_time(millisecond) < Deadline of
                true -> erlang:yield(), left_open(Root, Deadline);
                false -> Left
            end
    end.

reservations(#world{case_ = #case_{op = scan}}, {error, _}) ->
    [];
reservations(_World, _Result) ->
    #{reservations := Reservations} = erllama_cache_store:info(?STORE),
    [{reservations_left, Reservations} || Reservations =/= 0].

class({ok, _}) -> ok;
class({ok, _, _}) -> ok;
class({ok, _, _, _}) -> ok;
class(ok) -> ok;
class({error, already_present}) -> ok;
class({error, _}) -> error;
class(_) -> neither.

brief({ok, Info, Payload}) when is_map(Info) -> {ok, loaded, byte_size(Payload)};
brief(Result) -> Result.

%% What has to come of a call that fails once. Errors of hints are let go, and so are a close's, for
%% what it would tell the sync has told; what can be gone about in another way may be.
expected(_Case, _Kind, short) -> ok;
%% How much memory this process may use is read from files before a large load. Where those cannot
%% be read, nothing is known to bound it.
expected(#case_{op = load, size = holes}, Kind, _Action) when Kind =:= "open"; Kind =:= "read" ->
    either;
%% What was read may be that of the file under the key's name, which is corrupt then, and replaced.
expected(#case_{op = save, way = Way}, "pread", garbled) ->
    case finds(Way) of
        nothing -> error;
        _ -> either
    end;
%% Where nothing has come yet there is nothing to garble.
expected(_Case, "recv", garbled) -> either;
expected(_Case, _Kind, garbled) -> error;
expected(_Case, Kind, _Error) when
    Kind =:= "close"; Kind =:= "closedir";
    Kind =:= "sync_file_range_start"; Kind =:= "posix_fadvise"
->
    ok;
expected(_Case, _Kind, eintr) -> ok;
expected(#case_{op = load}, _Kind, estale) -> ok;
%% Another file is evicted, where it is not the root that has failed.
expected(#case_{op = evict}, Kind, _Error) when
    Kind =:= "open"; Kind =:= "fstat"; Kind =:= "fstatfs"; Kind =:= "unlinkat"
->
    either;
%% What stands there is looked at once more before it is replaced: if that fails, it is replaced all
%% the same, or looked at again.
expected(#case_{op = save, way = Way}, Kind, _Error) when
    Way =:= replace orelse Way =:= named_replace,
    Kind =:= "openat" orelse Kind =:= "fstat" orelse Kind =:= "fstatat" orelse Kind =:= "flock"
->
    either;
%% Nobody knows what is free then, and the save itself says whether there is room.
expected(_Case, "fstatvfs", _Error) -> ok;
%% A file system need not answer.
expected(_Case, "fstatfs", Error) when Error =:= enosys; Error =:= enotsup -> ok;
%% One name is skipped.
expected(#case_{op = scan}, Kind, _Error) when Kind =/= "fdopendir", Kind =/= "readdir" -> either;
expected(_Case, _Kind, _Error) -> error.

%% A disk that stays dead may keep what would have to be undone.
judge(#world{key = Key}, #fault{last = ?FOREVER}, _Report, Result, Before, After) ->
    New = After -- Before,
    Final = [Name || Name <- New, Name =:= file_name(Key)],
    Tmp = [Name || Name <- New, filename:extension(Name) =:= ".tmp"],
    _ = [ets:update_counter(?MODULE, dead_tmp, 1) || Tmp =/= []],
    _ = [ets:update_counter(?MODULE, dead_final, 1) || Final =/= [], class(Result) =:= error],
    [class_is_neither || class(Result) =:= neither] ++
        [{names, Before, After} || (New -- Final) -- Tmp =/= [] orelse length(Tmp) > 1];
judge(World, #fault{action = Action} = Fault, Report, Result, Before, After) ->
    #world{case_ = Case} = World,
    Hit = maps:get(hits, Report) > 0,
    Expected = case Hit of
        true -> expected(Case, Fault#fault.kind, Action);
        false -> ok
    end,
    Class = class(Result),
    [{expected, Expected} || Class =/= Expected, Expected =/= either orelse Class =:= neither] ++
        seen(World, Hit andalso Action, Result, Before, After).

%% What stands in the root, and under which names.
seen(#world{case_ = #case_{op = Op, way = Way}} = World, Action, Result, Before, After) when
    Op =:= save; Op =:= fetch
->
    #world{root = Root, key = Key, before = There} = World,
    Final = file_name(Key),
    case Result of
        {ok, Key} ->
            Good = lists:member(content(Root, Final), saved(World, Action)),
            [{names, Before, After} || After =/= lists:usort([Final | Before])] ++
                [content_is_another || not Good];
        _ ->
            Gone = finds(Way) =:= corrupt,
            Allowed = [Before | [Before -- [Final] || Gone]],
            [{names, Before, After} || not lists:member(After, Allowed)] ++
                [content_has_changed || lists:member(Final, After), read(Root, Final) =/= There]
    end;
seen(#world{case_ = #case_{op = evict}} = World, _Action, Result, Before, After) ->
    #world{root = Root, key = Key} = World,
    Final = file_name(Key),
    #{files := Files, bytes := Bytes, max_bytes := Max} = erllama_cache_store:info(?STORE),
    Sizes = [byte_size(read(Root, Name)) || Name <- After],
    There = {length(Sizes), lists:sum(Sizes)},
    New = After -- Before,
    [{names, Before, After} || New =/= [Final || class(Result) =:= ok]] ++
        [{index_and_files_differ, Files, Bytes, There} || {Files, Bytes} =/= There] ++
        [{above_the_bound, Bytes} || Bytes > Max] ++
        [content_is_another || New =:= [Final], [read(Root, Final)] =/= saved(World, false)];
seen(#world{case_ = #case_{op = scan}} = World, Action, Result, Before, After) ->
    #world{root = Root, key = Key, good = Good} = World,
    Junk = [file_name(Key), tmp_name(Key)],
    Clean = Before -- Junk,
    Whole = Action =:= false orelse Action =:= short orelse Action =:= eintr,
    Changed = [N || {N, Bytes} <- maps:to_list(Good), is_list(N), read(Root, N) =/= Bytes],
    [{names, Before, After} || (Before -- After) -- Junk =/= [] orelse After -- Before =/= []] ++
        [{junk_left, After} || Whole, class(Result) =:= ok, After =/= Clean] ++
        [{content_has_changed, Changed} || Changed =/= []];
seen(#world{case_ = #case_{op = delete}, key = Key}, _Action, Result, Before, After) ->
    Expected = case Result of
        ok -> Before -- [file_name(Key)];
        _ -> Before
    end,
    [{names, Before, After} || After =/= Expected];
seen(#world{case_ = #case_{op = load}, ours = Ours}, _Action, Result, Before, After) ->
    [{names, Before, After} || Before =/= After] ++
        [wrong_bytes || {ok, _, Payload} <- [Result], Payload =/= Ours];
seen(#world{case_ = #case_{op = Op}}, _Action, Result, Before, After) ->
    [{names, Before, After} || Before =/= After] ++
        [{saved_again, Result} || Op =:= present, element(1, Result) =:= ok].

content(Root, Name) ->
    case prim_file:read_file(filename:join(Root, Name)) of
        {ok, Bytes} -> Bytes;
        {error, _} = Error -> Error
    end.

%% What may stand there after a save has succeeded: the file that it found, or its own. Where
%% reading gave other bytes, the one that it found may have seemed corrupt.
saved(#world{case_ = #case_{way = Way}, good = #{ours := Ours, theirs := Theirs}}, Action) ->
    case finds(Way) of
        valid when Action =:= garbled -> [Theirs, Ours];
        valid -> [Theirs];
        _ -> [Ours]
    end.

saved_payloads(#world{ours = Ours, theirs = Theirs} = World, Action) ->
    Payloads = #{ours => Ours, theirs => Theirs},
    Names = World#world{good = #{ours => ours, theirs => theirs}},
    [maps:get(Name, Payloads) || Name <- saved(Names, Action)].

%% Everything works again: a load tells the truth, a save of the same key succeeds.
recover(World, #fault{last = ?FOREVER}, Result) ->
    _ = [stop_store() || whereis(?STORE) =/= undefined],
    restarted(World) ++ works(World, class(Result) =:= ok, dead);
recover(#world{case_ = #case_{op = scan}} = World, _Fault, _Result) ->
    stop_store(),
    restarted(World) ++ works(World, false, once);
recover(World, #fault{action = garbled}, Result) ->
    works(World, class(Result) =:= ok, garbled);
recover(World, _Fault, Result) ->
    works(World, class(Result) =:= ok, once).

%% A new start finds what there is, and sweeps.
restarted(#world{root = Root} = World) ->
    case start_store(World) of
        {ok, _} -> [{not_swept, Name} || Name <- names(Root), filename:extension(Name) =:= ".tmp"];
        Error -> error({no_start, Error})
    end.

works(#world{case_ = #case_{op = scan} = Case, root = Root, ours = Ours} = World, _, _) ->
    #world{good = Good} = World,
    Names = names(Root),
    Expected = lists:sort(["README" | [Name || Name <- maps:keys(Good), is_list(Name)]]),
    #{files := Files} = erllama_cache_store:info(?STORE),
    Wrong = [{names, Names} || Names =/= Expected] ++
        [{indexed, Files} || Files =/= 2] ++
        [{load_of, N} || N <- [2, 3], not loads(key(Case, N), Ours)],
    After = resaved(World) ++ delete_all([1, 2, 3], World),
    stop_store(),
    Wrong ++ After;
works(#world{case_ = #case_{op = evict} = Case, ours = Ours} = World, Ok, How) ->
    Loads = [{N, load(key(Case, N))} || N <- [1, 2, 3, 4]],
    [{load_of, N, Load} || {N, Load} <- Loads, Load =/= {ok, Ours}, Load =/= miss] ++
        [saved_is_not_there || Ok, How =/= dead, lists:keyfind(1, 1, Loads) =/= {1, {ok, Ours}}] ++
        resaved(World) ++ delete_all([1, 2, 3, 4], World);
works(#world{case_ = #case_{op = delete}, ours = Ours} = World, Ok, How) ->
    Allowed = [miss || Ok orelse How =:= dead] ++ [{ok, Ours} || not Ok orelse How =:= dead],
    after_load(World, Allowed) ++ resaved(World) ++ delete_all([1], World);
works(#world{case_ = #case_{op = Op, way = Way}} = World, Ok, How) when
    Op =:= save; Op =:= fetch
->
    Ours = {ok, World#world.ours},
    Before = case finds(Way) of
        nothing -> [miss];
        valid -> [{ok, World#world.theirs}];
        corrupt -> [miss, corrupt]
    end,
    Allowed = case How of
        _ when Ok -> [{ok, Payload} || Payload <- saved_payloads(World, How)];
        dead -> [Ours | Before];
        _ -> Before
    end,
    after_load(World, Allowed) ++ resaved(World) ++ delete_all([1], World);
works(#world{case_ = #case_{size = holes}, key = Key, ours = Ours} = World, _Ok, _How) ->
    %% In two steps: of a comprehension and what is appended to it the latter is evaluated first.
    Wrong = [loaded_again || not loads(Key, Ours)],
    Wrong ++ delete_all([1], World);
works(#world{ours = Ours} = World, _Ok, _How) ->
    after_load(World, [{ok, Ours}]) ++ resaved(World) ++ delete_all([1], World).

%% From the disk, not from a peer.
load(Key) ->
    case erllama_cache_store:load(?STORE, Key, #{peers => false}) of
        {ok, _Info, Payload} -> {ok, Payload};
        miss -> miss;
        {error, {corrupt, _}} -> corrupt;
        {error, unauthenticated} -> corrupt;
        Other -> Other
    end.

loads(Key, Payload) ->
    load(Key) =:= {ok, Payload}.

after_load(#world{key = Key} = World, Allowed) ->
    case load(Key) of
        {ok, Payload} = Loaded ->
            Same = lists:member(content_without_use(World), good(World)),
            [{wrong_bytes, byte_size(Payload)} || not lists:member(Loaded, Allowed)] ++
                [file_is_not_what_a_save_makes || not Same] ++
                ensure_deleted(World);
        Other ->
            [{load, Other} || not lists:member(Other, Allowed)]
    end.

good(#world{good = #{ours := Ours, theirs := Theirs}}) ->
    [without_use(Ours), without_use(Theirs)].

%% Hits and last use, which a load may have noted.
without_use(<<A:12/binary, _:32, B:16/binary, _:64, Rest/binary>>) ->
    <<A/binary, 0:32, B/binary, 0:64, Rest/binary>>.

content_without_use(#world{root = Root, key = Key}) ->
    without_use(read(Root, file_name(Key))).

ensure_deleted(#world{key = Key}) ->
    case erllama_cache_store:delete(?STORE, Key) of
        ok -> [];
        Error -> [{delete, Error}]
    end.

resaved(#world{key = Key, ours = Ours, case_ = #case_{op = Op}} = World) ->
    Delete = case Op of
        evict -> ensure_deleted(World);
        _ -> []
    end,
    Saved = save(World, meta(1), Ours),
    Delete ++ [{saved_again, Saved} || Saved =/= {ok, Key}] ++
        [loaded_again || not loads(Key, Ours)].

delete_all(Ns, #world{root = Root, case_ = #case_{op = Op} = Case}) ->
    _ = [ok = erllama_cache_store:delete(?STORE, key(Case, N)) || N <- Ns],
    _ = [ok = prim_file:delete(filename:join(Root, "README")) || Op =:= scan],
    Left = names(Root),
    _ = [prim_file:delete(filename:join(Root, Name)) || Name <- Left],
    [{left_behind, Left} || Left =/= []].

%%% The first table: every call fails once

faults(Base, Amount, Only) ->
    true = ets:new(?MODULE, [named_table, public]) =:= ?MODULE,
    ets:insert(?MODULE, [{violations, 0}, {dead, 0}, {dead_tmp, 0}, {dead_final, 0},
                          {behind, 0, 0, 0}, {behind_dead, 0, 0, 0}, {oracle, []}]),
    case Only of
        [] ->
            Cases = cases(Amount),
            lists:foreach(fun(Case) -> fail_each(Base, Case, Amount) end, Cases),
            print_table(length(Cases));
        [Name, Kind, First, Action] ->
            one(Base, case_of(Name), Kind, First, list_to_existing_atom(Action));
        [Name] ->
            fail_each(Base, case_of(Name), Amount),
            print_table(1)
    end,
    Checked = oracle(Base),
    Violations = ets:lookup_element(?MODULE, violations, 2),
    io:format("~nViolations: ~b~n", [Violations]),
    Checked andalso Violations =:= 0.

one(Base, Case, Kind, First, Action) ->
    World = setup(Case, root(Base), ?LARGE),
    _ = without_fault(World),
    N = list_to_integer(First),
    Fault = case Kind of
        "all" -> #fault{kind = any, first = N, last = ?FOREVER, action = Action};
        _ -> #fault{kind = Kind, first = N, last = N, action = Action}
    end,
    {Report, Class, Wrong} = attempt(World, Fault),
    io:format("~p~n~s: ~p~n", [Report, Class, Wrong]),
    [violation(Case, Fault, Wrong) || Wrong =/= []],
    teardown().

%% Never the same one twice: what has been learnt of a root is kept by its inode.
root(Base) ->
    filename:join(Base, lists:concat(["root_", erlang:unique_integer([positive])])).

fail_each(Base, Case, Amount) ->
    Begun = erlang:monotonic_time(millisecond),
    World = setup(Case, root(Base), ?LARGE),
    %% Twice, for the library's first use of its threads has calls of its own.
    _ = without_fault(World),
    #{counts := Counts, total := Total} = without_fault(World),
    Kinds = [{Kind, N} || {Kind, _} <- kinds(), N <- [maps:get(Kind, Counts)], N > 0],
    Again = fun() -> again(World, Base) end,
    Tried = lists:sum([
        fail_kind(Again, Case, Kind, N, Action, thorough(Amount, Case))
     || {Kind, N} <- Kinds, Action <- actions(Kind, Amount, Case)
    ]),
    Dead = lists:sum([
        fail_from(Again, N, Action)
     || Action <- dead_actions(Amount, Case), N <- some(Total, thorough(Amount, Case))
    ]),
    remember_good(World),
    teardown(),
    Took = erlang:monotonic_time(millisecond) - Begun,
    io:format("  ~-38s ~4b calls ~6b faults ~4b dead disks ~6.1f s~n",
              [name(Case), Total, Tried, Dead, Took / 1000]).

%% There must be nothing to complain of then.
without_fault(#world{case_ = Case} = World) ->
    case attempt(World, ?NO_FAULT) of
        {Report, ok, []} -> Report;
        {_Report, _Class, Wrong} -> error({without_a_fault, name(Case), Wrong})
    end.

%% A root that has never refused a file without a name has to be new each time.
again(#world{case_ = #case_{way = named_first} = Case, ours = Ours}, Base) ->
    stop_store(),
    setup(Case, root(Base), byte_size(Ours));
again(World, _Base) ->
    World.

%% A scan removes what is not what it says, and the disk is asked once.
actions(Kind, Amount, #case_{op = Op, size = Size}) ->
    Errors = case {Amount, Size} of
        {quick, large} -> [eio, eintr];
        {quick, small} -> [eio, eintr, enospc];
        {full, holes} -> [eio];
        {full, _} -> [Error || {Error, _} <- ?ERRORS]
    end,
    [Error || Error <- Errors, Error =/= eintr orelse is_interruptible(Kind)] ++
        [element(1, ?STALE) || Op =:= load, Size =/= holes] ++
        [
            Action
         || lists:member(Kind, ["read", "pread", "recv", "write", "writev", "pwrite", "pwritev"]),
            Action <- [short || Size =/= holes] ++ [garbled || Op =/= scan]
        ].

%% Two do nothing that a signal could interrupt.
is_interruptible(Kind) ->
    Kind =/= "fdopendir" andalso Kind =/= "fcntl".

dead_actions(full, #case_{size = small}) -> [eio, erofs];
dead_actions(_Amount, _Case) -> [eio].

%% Quick: the first and the last ones only.
some(Total, full) -> lists:seq(1, Total);
some(Total, quick) when Total =< 8 -> lists:seq(1, Total);
some(Total, quick) -> lists:seq(1, 4) ++ lists:seq(Total - 3, Total).

%% As often as the call is reached; `N' is how often it was without a fault.
fail_kind(Again, Case, Kind, N, Action, full) ->
    fail_until(Again, Case, Kind, 1, N, Action);
fail_kind(Again, Case, Kind, N, Action, quick) ->
    lists:sum([
        case fail(Again(), Kind, M, Action) of true -> 1; false -> missed(Case, Kind, M) end
     || M <- some(N, quick)
    ]).

%% There are hundreds of the same.
thorough(_Amount, #case_{size = holes}) -> quick;
thorough(Amount, _Case) -> Amount.

fail_until(Again, Case, Kind, M, N, Action) ->
    case fail(Again(), Kind, M, Action) of
        true -> 1 + fail_until(Again, Case, Kind, M + 1, N, Action);
        false when M > N -> 0;
        false -> missed(Case, Kind, M)
    end.

%% The kernel is asked once to begin with the disk, and not again while it is at that.
missed(_Case, "sync_file_range_start", M) when M > 1 -> 0;
%% In how many pieces a file comes depends on the other side.
missed(#case_{op = fetch}, _Kind, M) when M > 1 -> 0;
missed(_Case, Kind, M) -> error({not_reached, Kind, M}).

fail(#world{case_ = Case} = World, Kind, M, Action) ->
    Fault = #fault{kind = Kind, first = M, last = M, action = Action},
    note(Case, Fault),
    {#{hits := Hits}, Class, Wrong} = attempt(World, Fault),
    count(World, Fault, Hits > 0, Class, Wrong),
    Hits > 0.

%% All calls fail from the N-th on: the disk is dead, the file system read-only from now on.
fail_from(Again, N, Action) ->
    #world{case_ = Case} = World = Again(),
    Fault = #fault{kind = any, first = N, last = ?FOREVER, action = Action},
    note(Case, Fault),
    {_Report, Class, Wrong} = attempt(World, Fault),
    ets:update_counter(?MODULE, dead, 1),
    count_behind(behind_dead, Case, Class),
    [violation(Case, Fault, Wrong) || Wrong =/= []],
    1.

count(#world{case_ = Case}, #fault{kind = Kind} = Fault, true, Class, Wrong) ->
    Column = case Class of
        ok -> 3;
        error -> 4;
        neither -> 5
    end,
    Row = {{kind, Kind}, 0, 0, 0, 0},
    _ = ets:update_counter(?MODULE, {kind, Kind}, [{2, 1}, {Column, 1}], Row),
    count_behind(behind, Case, Class),
    [violation(Case, Fault, Wrong) || Wrong =/= []];
count(#world{case_ = Case}, Fault, false, _Class, Wrong) ->
    [violation(Case, Fault, Wrong) || Wrong =/= []].

count_behind(Row, #case_{behind = true}, Class) ->
    Columns = [{2, 1}] ++ [{3, 1} || Class =:= ok] ++ [{4, 1} || Class =:= error],
    _ = ets:update_counter(?MODULE, Row, Columns),
    ok;
count_behind(_Row, _Case, _Class) ->
    ok.

%% Should the VM die, the last line of this is what it died of.
note(Case, Fault) ->
    ok = prim_file:write_file(control() ++ ".last", [name(Case), " ", describe(Fault), "\n"]).

describe(#fault{kind = any, first = First, last = ?FOREVER, action = Action}) ->
    io_lib:format("all ~b ~s", [First, Action]);
describe(#fault{kind = Kind, first = First, action = Action}) ->
    io_lib:format("~s ~b ~s", [Kind, First, Action]).

violation(Case, Fault, Wrong) ->
    ets:update_counter(?MODULE, violations, 1),
    io:format("VIOLATION of ~s ~s:~n    ~p~n", [name(Case), describe(Fault), Wrong]).

print_table(Cases) ->
    io:format("~n~-26s ~8s ~8s ~8s~n", ["the n-th call fails", "tried", "ok", "error"]),
    Rows = lists:sort([
        {Kind, Tried, Ok, Error} || {{kind, Kind}, Tried, Ok, Error, _} <- ets:tab2list(?MODULE)
    ]),
    lists:foreach(fun({Kind, Tried, Ok, Error}) ->
        io:format("~-26s ~8b ~8b ~8b~n", [Kind, Tried, Ok, Error])
    end, Rows),
    Sum = fun(N) -> lists:sum([element(N, Row) || Row <- Rows]) end,
    io:format("~-26s ~8b ~8b ~8b   in ~b cases~n", ["all", Sum(2), Sum(3), Sum(4), Cases]),
    [{behind, Tried, Ok, Dropped}] = ets:lookup(?MODULE, behind),
    io:format("~-26s ~8b ~8b ~8b~n", ["of these, saves behind", Tried, Ok, Dropped]),
    [Dead, Tmp, Final] =
        [ets:lookup_element(?MODULE, Key, 2) || Key <- [dead, dead_tmp, dead_final]],
    io:format("~n~-26s ~8b~n", ["all from the n-th on", Dead]),
    [{behind_dead, DeadBehind, DeadOk, DeadDropped}] = ets:lookup(?MODULE, behind_dead),
    io:format("~-26s ~8b ~8b ~8b~n",
              ["of these, saves behind", DeadBehind, DeadOk, DeadDropped]),
    io:format("  Of these, ~b left a temporary file to the next start and ~b a whole file under~n"
              "  the key's name, because what would have undone it failed too.~n", [Tmp, Final]).

%%% The oracle

remember_good(#world{case_ = #case_{size = holes}}) ->
    %% Too long for the independent reader, which takes its time.
    ok;
remember_good(#world{good = Good, key = Key}) ->
    remember([{file_name(Key), Bytes} || {Name, Bytes} <- maps:to_list(Good), is_atom(Name)]),
    remember([File || {Name, _} = File <- maps:to_list(Good), is_list(Name)]).

%% Each content once: what a file has to be equal to has to be good.
remember(Files) ->
    [{oracle, Known}] = ets:lookup(?MODULE, oracle),
    ets:insert(?MODULE, {oracle, lists:usort(Files ++ Known)}).

oracle(Base) ->
    Files = ets:lookup_element(?MODULE, oracle, 2),
    Paths = [
        begin
            Dir = filename:join(Base, lists:concat(["good_", N])),
            ok = file:make_dir(Dir),
            write(Dir, Name, Bytes),
            filename:join(Dir, Name)
        end
     || {N, {Name, Bytes}} <- lists:zip(lists:seq(1, length(Files)), Files)
    ],
    case Paths of
        [] ->
            true;
        _ ->
            os:putenv("KVC_KEY", binary_to_list(binary:encode_hex(secret()))),
            Oracle = os:getenv("FAULTS_ORACLE"),
            Command = lists:join($\s, ["python3", Oracle, "check" | Paths]),
            Output = os:cmd(lists:flatten(["env -u LD_PRELOAD ", Command])),
            Ok = length([Line || "ok " ++ _ = Line <- string:split(Output, "\n", all)]),
            io:format("~nThe independent reader: ~b of ~b distinct files are good.~n",
                      [Ok, length(Paths)]),
            _ = [io:put_chars(Output) || Ok =/= length(Paths)],
            Ok =:= length(Paths)
    end.

%%% The second table: the VM ends at every call

%% In a VM of its own. Status 111: the shim has ended it.
victim(Root, Case, First, Action) ->
    World0 = setup(Case, Root, ?LARGE_FOR_CRASHES),
    World = prepare(World0),
    Kept = [{ok, _} = save(World, meta(9), World#world.ours) || keeps(Case)],
    acknowledge(Root, [before || Kept =/= []]),
    quiet(Root),
    arm(#fault{kind = any, first = First, last = First, action = Action}, is_named(Case)),
    Result = perform(World),
    acknowledge(Root, [done || class(Result) =:= ok]),
    class(Result) =:= ok.

%% Whether there is a file that nothing is done to.
keeps(#case_{op = Op}) -> Op =/= scan andalso Op =/= evict.

acknowledge(Root, What) ->
    _ = [ok = prim_file:write_file(lists:concat([Root, ".", W]), <<>>) || W <- What],
    ok.

acknowledged(Root, What) ->
    filelib:is_file(lists:concat([Root, ".", What])).

crashes(Base, Amount, Only) ->
    true = ets:new(?MODULE, [named_table, public]) =:= ?MODULE,
    ets:insert(?MODULE, [{violations, 0}, {oracle, []}]),
    case Only of
        [Name, First, Action] ->
            crash_one(Base, case_of(Name), list_to_integer(First), list_to_existing_atom(Action));
        [Name] ->
            crash_each(Base, case_of(Name), Amount);
        [] ->
            lists:foreach(fun(Case) -> crash_each(Base, Case, Amount) end, crash_cases(Amount))
    end,
    print_crashes(),
    Checked = oracle(Base),
    Violations = ets:lookup_element(?MODULE, violations, 2),
    io:format("~nViolations: ~b~n", [Violations]),
    Checked andalso Violations =:= 0.

crash_each(Base, Case, Amount) ->
    Begun = erlang:monotonic_time(millisecond),
    World = setup(Case, root(Base), ?LARGE_FOR_CRASHES),
    Judge = judge_of(Case, World),
    %% No call is the 0-th.
    Whole = root(Base),
    {0, #{hits := 0, total := Total}} = spawn_victim(Whole, Case, 0, exit_before),
    true = acknowledged(Whole, done),
    check_crash(Judge, Whole, 0, exit_before, none),
    Points = [{N, Action} || N <- lists:seq(1, Total), Action <- ends(Amount)],
    Run = fun({N, Action}) ->
        Root = root(Base),
        {Root, N, Action, spawn_victim(Root, Case, N, Action)}
    end,
    lists:foreach(fun({Root, N, Action, Ended}) ->
        case Ended of
            {?CRASHED, #{hit_kind := Kind}} -> check_crash(Judge, Root, N, Action, Kind);
            %% It came in fewer pieces.
            {0, #{hits := 0}} when Case#case_.op =:= fetch -> ok
        end
    end, in_parallel(Run, Points)),
    remember_good(World),
    teardown(),
    Took = erlang:monotonic_time(millisecond) - Begun,
    io:format("  ~-38s ~4b calls ~6b crashes ~6.1f s~n",
              [name(Case), Total, length(Points), Took / 1000]).

%% After one call is before the next, but for what other threads do meanwhile.
ends(quick) -> [exit_after];
ends(full) -> [exit_before, exit_after].

crash_one(Base, Case, N, Action) ->
    Judge = judge_of(Case, setup(Case, root(Base), ?LARGE_FOR_CRASHES)),
    Root = root(Base),
    {Status, #{hit_kind := Kind}} = spawn_victim(Root, Case, N, Action),
    io:format("status ~b, at ~s: ~p~n", [Status, Kind, names(Root)]),
    check_crash(Judge, Root, N, Action, Kind),
    teardown().

judge_of(#case_{op = scan}, World) -> World;
judge_of(_Case, World) -> stop_store(), World.

%% As many at a time as there are processors.
in_parallel(Fun, Points) ->
    Parent = self(),
    Workers = erlang:system_info(logical_processors_available),
    Jobs = case Workers of
        unknown -> 2;
        _ -> max(1, Workers)
    end,
    collect(Fun, Parent, Points, Jobs, 0, []).

collect(_Fun, _Parent, [], _Jobs, 0, Done) ->
    Done;
collect(Fun, Parent, [Point | Rest], Jobs, Running, Done) when Running < Jobs ->
    _ = spawn_link(fun() -> Parent ! {done, Fun(Point)} end),
    collect(Fun, Parent, Rest, Jobs, Running + 1, Done);
collect(Fun, Parent, Points, Jobs, Running, Done) ->
    receive
        {done, Result} -> collect(Fun, Parent, Points, Jobs, Running - 1, [Result | Done]);
        {'EXIT', _, Reason} when Reason =/= normal -> error(Reason)
    end.

spawn_victim(Root, Case, N, Action) ->
    Control = Root ++ ".control",
    Args = ["victim", Root, name(Case), integer_to_list(N), atom_to_list(Action)],
    Port = open_port({spawn_executable, os:getenv("FAULTS_VICTIM")}, [
        {args, Args}, {env, [{"IOFAULT", Control}]}, exit_status, stderr_to_stdout, binary
    ]),
    {Status, Output} = ended(Port, []),
    Report = report(Control),
    _ = [io:put_chars(Output) || Status =/= ?CRASHED, Status =/= 0],
    {Status, Report}.

ended(Port, Output) ->
    receive
        {Port, {data, Data}} -> ended(Port, [Output | Data]);
        {Port, {exit_status, Status}} -> {Status, Output}
    end.

%% What a victim's shim has left.
report(Control) ->
    {ok, Bytes} = prim_file:read_file(Control),
    ok = prim_file:delete(Control),
    Length = 8 * (?WORD_COUNTS + ?MOST_KINDS),
    <<Words:Length/binary, Names/binary>> = Bytes,
    [_, _, _, _, _, _, Hits, HitKind, Total | _] = [Word || <<Word:64/native>> <= Words],
    <<Name:?NAME_SIZE/binary, _/binary>> = binary:part(
        Names, HitKind * ?NAME_SIZE, byte_size(Names) - HitKind * ?NAME_SIZE
    ),
    #{hits => Hits, total => Total, hit_kind => hd(string:split(binary_to_list(Name), [0]))}.

check_crash(Judge, Root, N, Action, Kind) ->
    Wrong = left_by_crash(Judge#world{root = Root}),
    _ = [
        ets:update_counter(?MODULE, {crash, Kind, Action}, 1, {{crash, Kind, Action}, 0})
     || Kind =/= none
    ],
    case Wrong of
        [] ->
            ok;
        _ ->
            ets:update_counter(?MODULE, violations, 1),
            io:format("VIOLATION of ~s ~b ~s, at ~s:~n    ~p~n",
                      [name(Judge#world.case_), N, Action, Kind, Wrong])
    end,
    ok = file:del_dir_r(Root),
    _ = [prim_file:delete(Root ++ Suffix) || Suffix <- [".before", ".done"]],
    ok.

%% What is there after the VM's end, before and after a store has been started on it.
left_by_crash(#world{case_ = Case, root = Root, key = Key, good = Good, ours = Ours} = World) ->
    #case_{op = Op, way = Way} = Case,
    Done = acknowledged(Root, done),
    Final = file_name(Key),
    Names = names(Root),
    Kept = lists:member(file_name(key(Case, 9)), Names),
    Corrupt = [spoilt(World) || finds(Way) =:= corrupt] ++
        [<<(maps:get(theirs, Good))/binary, 0>> || Op =:= scan],
    Contents = [{Name, read(Root, Name)} || Name <- Names, filename:extension(Name) =:= ".kvc"],
    remember([File || {_, Bytes} = File <- Contents, not lists:member(Bytes, Corrupt)]),
    NotWhole = [
        {not_whole, Name}
     || {Name, Bytes} <- Contents,
        Name =:= Final, not lists:member(Bytes, Corrupt ++ maps:values(Good))
    ],
    Gap = [gap || Op =:= save, finds(Way) =/= nothing, not lists:member(Final, Names)],
    Lost = [acknowledged_file_is_gone || acknowledged(Root, before), not Kept],
    {ok, _} = start_store(World),
    Swept = [{not_swept, Name} || Name <- names(Root), filename:extension(Name) =:= ".tmp"],
    Loads = [wrong_load_of_kept || Kept, not loads(key(Case, 9), Ours)] ++ crash_loads(World, Done),
    Deleted = case load(Key) of
        {ok, _} -> ensure_deleted(World);
        _ -> []
    end,
    Resaved = resaved(World),
    stop_store(),
    NotWhole ++ Gap ++ Lost ++ Swept ++ Loads ++ Deleted ++ Resaved.

crash_loads(#world{case_ = #case_{op = scan} = Case, ours = Ours}, _Done) ->
    [{load_of, N} || N <- [2, 3], not loads(key(Case, N), Ours)];
crash_loads(#world{case_ = #case_{op = evict} = Case, ours = Ours}, Done) ->
    Loads = [{N, load(key(Case, N))} || N <- [1, 2, 3, 4]],
    %% One had to go, and no more than one.
    [{loads, Loads} || length([N || {N, {ok, _}} <- Loads]) < 2] ++
        [{load_of, N} || {N, Load} <- Loads, Load =/= {ok, Ours}, Load =/= miss] ++
        [acknowledged_is_gone || Done, lists:keyfind(1, 1, Loads) =/= {1, {ok, Ours}}];
crash_loads(#world{case_ = #case_{op = delete}, key = Key, ours = Ours}, Done) ->
    Load = load(Key),
    [{load, Load} || Load =/= miss, Done orelse Load =/= {ok, Ours}];
crash_loads(#world{case_ = #case_{way = Way}, key = Key} = World, Done) ->
    [Payload] = saved_payloads(World, none),
    Saved = {ok, Payload},
    Allowed = case finds(Way) of
        nothing -> [Saved | [miss || not Done]];
        valid -> [Saved];
        corrupt -> [Saved | [corrupt || not Done]]
    end,
    Load = load(Key),
    [{load, Load, Done} || not lists:member(Load, Allowed)].

print_crashes() ->
    io:format("~n~-26s ~8s ~8s~n", ["the VM ends", "before", "after"]),
    All = [{Kind, Action, N} || {{crash, Kind, Action}, N} <- ets:tab2list(?MODULE)],
    Count = fun(Kind, Action) -> lists:sum([N || {K, A, N} <- All, K =:= Kind, A =:= Action]) end,
    Kinds = lists:usort([Kind || {Kind, _, _} <- All]),
    lists:foreach(fun(Kind) ->
        io:format("~-26s ~8b ~8b~n", [Kind, Count(Kind, exit_before), Count(Kind, exit_after)])
    end, Kinds),
    Sum = fun(Action) -> lists:sum([N || {_, A, N} <- All, A =:= Action]) end,
    io:format("~-26s ~8b ~8b~n", ["all", Sum(exit_before), Sum(exit_after)]).
