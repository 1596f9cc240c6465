%% Saves behind their callers, inside erllama, while what takes part in one is killed: at each call
%% that a save makes to the host, while it waits for its slot, and between two slices.
%%
%% A server that is killed is missed until the save has ended, or is there again at once. What comes
%% of the save is in fate/2. In any case nothing is left, what stands under the key's name is whole,
%% and the next save of the key ends well.
-module(erllama_cache_behind_kill_SUITE).
-behaviour(application).

-include("erllama_cache_erllama_util.hrl").
-include_lib("common_test/include/ct.hrl").
-include_lib("stdlib/include/assert.hrl").

-compile(export_all).

-import(erllama_cache_test_util, [
    files/1, file_of/2, eventually/1, logged/1, actor/0, ask/2, tell/2, answer/2, kill/1,
    own_messages/0
]).
-import(erllama_cache_erllama_util, [
    meta/1, restart_writer/1, start_writer/1, args/1, by_kind/2, nothing_open/1
]).
-import(erllama_cache_hooked_host, [hold_turns/0, next_turn/1, go_on/1, waits_for_a_turn/1]).

-define(PENDING, erllama_cache_pending).
%% Too large to be written and published by one call.
-define(LARGE, (1 bsl 20)).
%% Takes longer to write than a slice lasts.
-define(SLICES, (32 bsl 20)).
-define(CONFIG, #{max_concurrent => 1, write_behind => #{}}).

%% What the save does when it is hit: a call of the host, or what it waits for.
-type point() ::
    quant_byte | key | reserve_save | dir | check_reservation | mark_published | announce_saved
    | incr | slot | turn.
%% Who is killed, and which servers are started again right away.
-type hit() :: {Victims :: [victim()], missed | replaced}.
-type victim() :: caller | saver | owner | pending_set | writer | tier_server | metadata_server.

suite() ->
    erllama_cache_erllama_util:suite().

all() ->
    erllama_cache_erllama_util:all().

groups() ->
    erllama_cache_erllama_util:groups([
        the_caller_is_killed,
        the_saver_is_killed,
        the_owner_is_killed,
        the_pending_set_is_killed,
        the_writer_is_killed,
        the_tier_server_is_killed,
        the_metadata_server_is_killed,
        all_servers_are_killed,
        a_save_has_ended_when_its_failure_is_counted,
        a_key_can_be_saved_again_when_a_failure_is_answered,
        the_callers_application_is_stopped
    ]).

the_caller_is_killed(Config) ->
    at_each_point({[caller], missed}, Config).

the_saver_is_killed(Config) ->
    at_each_point({[saver], missed}, Config).

the_owner_is_killed(Config) ->
    at_each_point({[owner], missed}, Config).

the_pending_set_is_killed(Config) ->
    at_each_point({[pending_set], missed}, Config).

the_writer_is_killed(Config) ->
    at_each_point({[writer], missed}, Config),
    at_each_point({[writer], replaced}, Config).

the_tier_server_is_killed(Config) ->
    at_each_point({[tier_server], missed}, Config),
    at_each_point({[tier_server], replaced}, Config).

the_metadata_server_is_killed(Config) ->
    at_each_point({[metadata_server], missed}, Config),
    at_each_point({[metadata_server], replaced}, Config).

%% While all are gone, a save that has its key reserved goes on without them.
all_servers_are_killed(Config) ->
    at_each_point({[writer, metadata_server, tier_server], missed}, Config),
    at_each_point({[writer, metadata_server, tier_server], replaced}, Config).

at_each_point({[Victim | _], _} = Hit, Config) ->
    _ = restart_writer(?CONFIG),
    Sizes = [{Point, Size} || Point <- before_the_saver() ++ of_the_saver() ++ [slot],
                              Size <- [9, ?LARGE]],
    [hit(Point, Hit, Size, Config) || {Point, Size} <- Sizes ++ [{turn, ?SLICES}],
                                      is_there(Victim, Point)],
    ok.

before_the_saver() ->
    [quant_byte, key].

of_the_saver() ->
    [reserve_save, dir, check_reservation, mark_published, announce_saved, incr].

is_there(Victim, Point) when Victim =:= saver; Victim =:= owner ->
    not lists:member(Point, before_the_saver());
is_there(_Victim, _Point) ->
    true.

%% Who has waited for a save may look into the log and at the counters.
a_save_has_ended_when_its_failure_is_counted(_Config) ->
    _ = restart_writer(?CONFIG),
    Driver = self(),
    Wait = fun(_Args) -> at_the_point(Driver) end,
    [#{event := save_dropped, key := Hex}] = logged(fun() ->
        ok = ?WRITER:acquire(0),
        {ok, _} = save(meta([1]), ?PAYLOAD),
        eventually(fun() -> length(?WRITER:waiters()) =:= 1 end),
        [#{pid := Saver}] = ?WRITER:waiters(),
        ok = erllama_fake:script(incr, [{before, Wait}]),
        ok = kill(Saver),
        Owner = receive {at_the_point, Pid} -> Pid end,
        ?assertEqual({error, {pending, 1}}, ?WRITER:flush(0)),
        Owner ! strike,
        ok = ?WRITER:flush(infinity)
    end),
    ?assertEqual(#{20 => 1}, erllama_cache_counters:all()),
    ok = ?WRITER:release(),
    {ok, Key} = save(meta([1]), ?PAYLOAD),
    ?assertEqual(erllama_cache_log:hex(Key), Hex),
    ok = ?WRITER:flush(infinity).

%% The caller of a save that has failed finds its place free.
a_key_can_be_saved_again_when_a_failure_is_answered(_Config) ->
    _ = restart_writer(?CONFIG),
    Driver = self(),
    Caller = actor(),
    Fail = fun(_Args) ->
        ok = sys:suspend(?PENDING),
        Driver ! suspended,
        "with a \0"
    end,
    ok = erllama_cache_erllama_util:script_dir([{instead, Fail}]),
    Failure = tell(Caller, fun() -> save(meta([1]), ?PAYLOAD) end),
    receive suspended -> ok end,
    Asked = {message_queue_len, 1},
    try
        eventually(fun() -> process_info(whereis(?PENDING), message_queue_len) =:= Asked end),
        %% It is not told before the pending set has answered.
        ?assertEqual(
            [{message_queue_len, 0}, {current_function, {erllama_cache_behind, hand_over, 2}}],
            process_info(Caller, [message_queue_len, current_function])
        )
    after
        ok = sys:resume(?PENDING)
    end,
    ?assertEqual({error, badarg}, answer(Caller, Failure)),
    ok = erllama_cache_erllama_util:restart_tier_server(),
    {ok, _} = save(meta([1]), ?PAYLOAD),
    ok = ?WRITER:flush(infinity).

%% When an application has stopped, its master kills what belongs to it still. That must be neither
%% the saves that its processes have begun nor the server that tells who has ended.
the_callers_application_is_stopped(Config) ->
    Root = root(Config),
    erllama_cache_erllama_util:on_peer(["erl"], fun() ->
        ok = erllama_fake:start(?TIER, Root),
        _ = start_writer(?CONFIG),
        ok = ?WRITER:acquire(0),
        ok = application:load({application, ?MODULE, [{mod, {?MODULE, self()}}]}),
        ok = application:start(?MODULE),
        Caller = receive {started, Pid} -> Pid end,
        {ok, Behind} = ask(Caller, fun() -> save(meta([1]), ?PAYLOAD) end),
        {ok, _} = ask(Caller, fun() ->
            ?WRITER:save_async(?TIER, disk, meta([2]), ?PAYLOAD, #{detach => true})
        end),
        eventually(fun() -> length(?WRITER:waiters()) =:= 2 end),
        ok = application:stop(?MODULE),
        ?assertEqual({error, {pending, 2}}, ?WRITER:flush(0)),
        ok = ?WRITER:release(),
        ok = ?WRITER:flush(infinity),
        ?assertMatch([_, _], ?META_SRV:stored()),
        ?assert(lists:member(Behind, ?META_SRV:stored()))
    end).

%% The application: its one process does what it is asked.
start(normal, Driver) ->
    Caller = actor(),
    Driver ! {started, Caller},
    {ok, Caller}.

stop(_State) ->
    ok.

%%% What comes of a save

%% What the caller is told: `lost', nothing, it is dead; `saved', the key; otherwise an error or an
%% exception. What becomes of the save: it is `announced'; left `on_disk' for a host that starts
%% later; there is `none'. A reason is the one that the log has. And whether there is a file then.
-spec fate(point(), hit()) ->
    {lost | saved | {error, term()} | {exit, noproc | no_writer},
     announced | on_disk | none | {announced | none, raised | term()}, File :: boolean()}.
fate(Point, {[caller], _}) ->
    case {is_there(saver, Point), is_answered(Point)} of
        {false, _} -> {lost, none, false};
        {true, false} -> {lost, announced, true};
        {true, true} -> {saved, announced, true}
    end;
fate(Point, {[saver], _}) ->
    Died = {saver_died, killed},
    case is_answered(Point) of
        false -> {{error, Died}, none, false};
        %% The host takes over what was marked.
        true when Point =:= announce_saved -> {saved, {announced, Died}, true};
        %% Nobody has told the owner.
        true when Point =:= incr -> {saved, {announced, Died}, true};
        true -> {saved, {none, Died}, is_published(Point)}
    end;
fate(Point, {[owner], _}) ->
    case is_answered(Point) of
        false -> {{error, {saver_died, killed}}, announced, true};
        true -> {saved, announced, true}
    end;
fate(_Point, {[pending_set], _}) ->
    {saved, announced, true};
fate(Point, {[tier_server], missed}) ->
    case is_answered(Point) of
        false -> {{exit, noproc}, none, false};
        true -> {saved, announced, true}
    end;
fate(_Point, {[tier_server], replaced}) ->
    {saved, announced, true};
fate(Point, {[writer], missed}) ->
    case is_there(saver, Point) of
        %% No writer runs when it would begin.
        false -> {{exit, no_writer}, none, false};
        true -> {saved, announced, true}
    end;
fate(_Point, {[writer], replaced}) ->
    {saved, announced, true};
fate(incr, {_Servers, _}) ->
    {saved, announced, true};
fate(Point, {[metadata_server], missed}) ->
    case is_reserved(Point) of
        false -> {{exit, noproc}, none, false};
        true -> {saved, {none, raised}, is_published(Point)}
    end;
fate(Point, {[writer | _], missed}) ->
    case {is_there(saver, Point), is_answered(Point)} of
        {false, _} -> {{exit, no_writer}, none, false};
        {true, false} -> {{exit, noproc}, none, false};
        {true, true} -> {saved, on_disk, true}
    end;
fate(Point, {_Servers, replaced}) ->
    case is_reserved(Point) of
        false -> {saved, announced, true};
        true -> {saved, {none, expired}, is_published(Point)}
    end.

is_reserved(Point) ->
    not lists:member(Point, [reserve_save | before_the_saver()]).

is_answered(Point) ->
    not lists:member(Point, [reserve_save, dir | before_the_saver()]).

is_published(Point) ->
    lists:member(Point, [mark_published, announce_saved, incr]).

%% Whether the host knows of the file in the end: a new metadata server knows of nothing.
is_stored(incr, announced, {Victims, _}) -> not lists:member(metadata_server, Victims);
is_stored(_Point, announced, _Hit) -> true;
is_stored(_Point, {announced, _Reason}, _Hit) -> true;
is_stored(_Point, _Fate, _Hit) -> false.

%%% One save

hit(Point, Hit, Size, Config) ->
    ct:log("~p: ~p, ~w bytes", [Point, Hit, Size]),
    Meta = (meta([erlang:unique_integer([positive])]))#{save_reason := continued},
    Payload = binary:copy(<<7>>, Size),
    Key = erllama_cache_erllama_util:key_of(Meta, erllama_cache_nif:quant_byte(q4_k_m)),
    Before = seen(),
    %% Each is asked for its root once.
    ok = erllama_cache_erllama_util:restart_tier_server(),
    ok = erllama_fake:forget_calls(),
    Caller = actor(),
    Strike = strike(Hit, Caller, root(Config)),
    Reports = logged(fun() ->
        _ = put(told, hit_at(Point, Strike, Caller, fun() -> save(Meta, Payload) end)),
        ok = has_ended()
    end),
    ok = start_what_is_missed(Config),
    ok = nothing_left(Config),
    ok = no_messages(Caller),
    {Told, Fate, IsFile} = fate(Point, Hit),
    ?assertEqual(told(Told, Key), get(told)),
    ok = told_of(Fate, Told, Key, Reports, Before),
    ?assertEqual([filename:basename(file_of(root(Config), Key)) || IsFile], files(root(Config))),
    IsStored = is_stored(Point, Fate, Hit),
    ?assertEqual([Key || IsStored], ?META_SRV:stored()),
    %% The log has the calls that failed, too.
    IsCalled = IsStored orelse Fate =:= on_disk orelse lists:member(Point, [announce_saved, incr]),
    ?assertEqual([Key || IsCalled], announced()),
    %% What a process needs for its saves and loads goes with it.
    Next = actor(),
    ok = saved_once_more(Next, {Meta, Payload}, Key, IsStored, Config),
    lists:foreach(fun erllama_cache_test_util:kill/1, [Caller, Next]),
    eventually(fun() -> no_more_than(map_get(objects, Before)) end),
    ok = ?META_SRV:forget(Key),
    ok = file:delete(file_of(root(Config), Key)).

told(saved, Key) -> {ok, Key};
told(Told, _Key) -> Told.

%% Saves, strikes, and returns what the caller is told.
hit_at(slot, Strike, Caller, Save) ->
    Holder = actor(),
    ok = ask(Holder, fun() -> ?WRITER:acquire(0) end),
    Told = ask(Caller, Save),
    eventually(fun() -> length(?WRITER:waiters()) =:= 1 end),
    [#{pid := Saver}] = ?WRITER:waiters(),
    ok = Strike(Saver),
    ok = kill(Holder),
    Told;
hit_at(turn, Strike, Caller, Save) ->
    Turns = hold_turns(),
    Told = ask(Caller, Save),
    [#{pid := Saver}] = ?WRITER:holders(),
    ok = waits_for_a_turn(Saver),
    Next = next_turn(Turns),
    %% That was one slice, and there is more to write.
    ok = waits_for_a_turn(Saver),
    ok = Strike(Saver),
    ok = go_on(Next),
    Told;
hit_at(Point, Strike, Caller, Save) ->
    Driver = self(),
    Step = fun(_Args) ->
        _ = is_answered(Point) andalso at_the_point(Driver),
        Strike(self())
    end,
    ok = erllama_fake:script(function(Point), [{before, Step}]),
    Ref = tell(Caller, Save),
    Told =
        try
            answer(Caller, Ref)
        catch
            error:{actor_died, killed} -> lost;
            exit:{noproc, {?WRITER, save, _}} -> {exit, no_writer};
            exit:{noproc, _} -> {exit, noproc}
        end,
    ok = case is_answered(Point) of
        true -> receive {at_the_point, Saver} -> Saver ! strike, ok end;
        false -> ok
    end,
    Told.

%% Waits until the caller has been told.
at_the_point(Driver) ->
    Driver ! {at_the_point, self()},
    receive strike -> ok end.

function(key) -> by_kind(make, make_text);
function(Point) -> Point.

%% Kills, and starts servers again. For the driver, or for the process that calls the host: if that
%% is to be killed, it goes last.
strike({Victims, Servers}, Caller, Root) ->
    Driver = self(),
    fun(Process) ->
        Saving = [Pid || Process =/= Caller, Pid <- [Process, owner(Process)]],
        Driver ! {saving, Saving},
        Pids = [pid(Victim, Caller, Process) || Victim <- Victims],
        lists:foreach(fun erllama_cache_test_util:kill/1, lists:delete(self(), Pids)),
        _ = [start_server(Victim, Root) || Victim <- Victims, Servers =:= replaced],
        _ = lists:member(self(), Pids) andalso exit(self(), kill),
        ok
    end.

pid(caller, Caller, _Saver) -> Caller;
pid(saver, _Caller, Saver) -> Saver;
pid(owner, _Caller, Saver) -> owner(Saver);
pid(pending_set, _Caller, _Saver) -> pending_set();
pid(writer, _Caller, _Saver) -> whereis(?WRITER);
pid(tier_server, _Caller, _Saver) -> whereis(?TIER);
pid(metadata_server, _Caller, _Saver) -> whereis(?META_SRV).

owner(Saver) ->
    {parent, Owner} = process_info(Saver, parent),
    Owner.

%% It is started by the first that needs it.
pending_set() ->
    ok = ?PENDING:leave(),
    whereis(?PENDING).

start_server(writer, _Root) -> start_writer(?CONFIG);
start_server(tier_server, Root) -> {ok, _} = ?DISK_SRV:start(?TIER, Root);
start_server(metadata_server, _Root) -> {ok, _} = ?META_SRV:start().

start_what_is_missed(Config) ->
    _ = [start_server(Victim, root(Config))
         || {Victim, Name} <- [{writer, ?WRITER}, {tier_server, ?TIER},
                               {metadata_server, ?META_SRV}],
            whereis(Name) =:= undefined],
    ok.

%% The pending set may have been killed, and then knows of nothing to wait for.
has_ended() ->
    Saving = receive {saving, Pids} -> Pids end,
    eventually(fun() -> not lists:any(fun is_process_alive/1, Saving) end),
    ?WRITER:flush(infinity).

%%% What is left

nothing_left(Config) ->
    eventually(fun() ->
        {?WRITER:current(), ?WRITER:waiters(), ?META_SRV:reserved(), ?PENDING:owners()} =:=
            {0, [], [], []}
    end),
    ?assertMatch(#{pending := 0, pending_bytes := 0, inflight_bytes := 0}, ?WRITER:info()),
    ?assertEqual(ok, ?WRITER:flush(0)),
    nothing_open(root(Config)).

no_messages(Caller) ->
    ?assertEqual([], own_messages()),
    _ = is_process_alive(Caller) andalso
        ?assertEqual([], ask(Caller, fun erllama_cache_test_util:own_messages/0)),
    ok.

%% What the log and the counters say.
told_of(Fate, Told, Key, Reports, #{writer := Writer, host := Host}) ->
    #{writer := WriterNow, host := HostNow} = seen(),
    Reasons = [reason(Report, Key) || Report <- Reports],
    Dropped = [Reason || {_, Reason} <- [Fate]],
    ?assertEqual(Dropped, Reasons),
    EndedWell = case Fate of
        _ when Fate =:= announced; Fate =:= on_disk -> 1;
        _ -> 0
    end,
    %% A saver that is killed ends with no error of its own.
    Failed = length([x || {_, Reason} <- [Fate, Told],
                          lists:member(Reason, [raised, expired, noproc])]),
    ?assertEqual(#{dropped => length(Dropped), saves => EndedWell, save_errors => Failed},
                 maps:map(fun(What, N) -> N - map_get(What, Writer) end, WriterNow)),
    ?assertEqual({EndedWell, length(Dropped)},
                 {slot(5, HostNow) - slot(5, Host), slot(20, HostNow) - slot(20, Host)}),
    ok.

reason(#{event := save_dropped, tier_srv := ?TIER, key := Hex, save_reason := continued,
         reason := Reason}, Key) ->
    ?assertEqual(erllama_cache_log:hex(Key), Hex),
    case Reason of
        {raised, exit, {noproc, _}, _Stack} -> raised;
        _ -> Reason
    end.

seen() ->
    #{
        writer => maps:with([dropped, saves, save_errors], ?WRITER:info()),
        host => erllama_cache_counters:all(),
        objects => objects()
    }.

slot(Slot, Counters) ->
    maps:get(Slot, Counters, 0).

objects() ->
    true = garbage_collect(),
    erllama_cache_nif:live_objects().

no_more_than(Objects) ->
    Now = objects(),
    lists:all(fun(Type) -> map_get(Type, Now) =< map_get(Type, Objects) end, maps:keys(Now)).

announced() ->
    [Key || [Key | _] <- args(announce_saved)].

saved_once_more(Next, {Meta, Payload}, Key, IsStored, Config) ->
    ok = erllama_fake:forget_calls(),
    Expected = case IsStored of
        true -> {error, already_present};
        false -> {ok, Key}
    end,
    ?assertEqual(Expected, ask(Next, fun() -> save(Meta, Payload) end)),
    ok = ?WRITER:flush(infinity),
    ?assertEqual([Key || not IsStored], announced()),
    ?assertEqual([Key], ?META_SRV:stored()),
    ?assertEqual([filename:basename(file_of(root(Config), Key))], files(root(Config))),
    {ok, _, Loaded} = ask(Next, fun() -> erllama_cache_reader:load(?TIER, Key) end),
    ?assert(Loaded =:= Payload),
    ?assertMatch({ok, _, Payload}, ?DISK_SRV:load(?TIER, Key)),
    nothing_left(Config).

%%% In short

root(Config) ->
    ?config(root, Config).

%% As the host saves: it has no time to wait.
save(Meta, Payload) ->
    ?WRITER:save(?TIER, disk, Meta, Payload, 0).
