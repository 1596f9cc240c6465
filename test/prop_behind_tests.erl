%% Saves behind their callers against a model of them: callers save, flush, load and die; savers,
%% owners, the server of the pending set and the writer are killed, the writer is stopped and
%% started, saves fail late, in any order. After each step the pending set, the queue, the counters,
%% the log, and what can be loaded from which of two stores are what the model says.
%%
%% A save with a slot runs to its end, so when all is quiet, what is pending waits for a slot. Slots
%% become free one at a time: who is served next then finds what the one before has left.
-module(prop_behind_tests).
-behaviour(proper_statem).
-behaviour(erllama_cache_host).

%% Before eunit.hrl, which leaves alone what this has defined.
-include_lib("proper/include/proper.hrl").
-include_lib("eunit/include/eunit.hrl").

-export([prop_behind/0]).
-export([initial_state/0, command/1, precondition/2, next_state/3, postcondition/3]).
%% The steps.
-export([hold/1, release/1, drop_holder/1, save/5, fail_late/1, load/2, load_after/2, flush/0]).
-export([flush/1, delete/1, die/1, kill_saver/1, kill_owner/1, kill_pending_set/0, set_limit/1]).
-export([lose_writer/0, stop_writer/0, start_writer/1]).
%% The host: the stores, and what a step has ordered.
-export([identify/2, reserve/4, root/1, check/3, mark_published/4, announce/6, cancel/3, count/2]).

-import(erllama_cache_statem_util, [machine_test/5, property/2, matches/3, step/1]).
-import(erllama_cache_test_util, [
    actor/0, tell/2, eventually/2, files/1, file_of/2, kill/1, own_messages/0, silence/0,
    unsilence/1, temporary_dir/1, with_log/1
]).

-define(WRITER, erllama_cache_writer).
-define(PENDING, erllama_cache_pending).
-define(SEQUENCES, 300).
-define(STORES, [prop_behind_a, prop_behind_b]).
-define(KEYS, [1, 2, 3]).
-define(HOLDERS, [x, y, z]).
-define(CALLERS, [p, q, r]).
%% What may be pending, and how large what is saved behind its caller.
-define(MAX, 3).
-define(MAX_BYTES, 100).
-define(SAVE_BYTES, 60).
%% How long whatever is to happen may take. Short, because shrinking waits it out again and again.
-define(DEADLINE, 4000).

%%% What the model knows

-type id() :: {Store :: atom(), Key :: 1..3}.

%% A save whose saver waits for a slot.
-record(saver, {
    id :: id(),
    size :: pos_integer(),
    n :: non_neg_integer(),
    %% Whether its owner lives, and whether the pending set has it.
    owned = true :: boolean(),
    listed = true :: boolean()
}).

-record(model, {
    server = up :: up | down,
    limit = 1 :: pos_integer(),
    holds = [] :: [atom()],
    %% Saves in line that wait, and after them those behind their callers: the next one first.
    queue = [] :: [{Caller :: atom(), id(), Size :: pos_integer(), N :: non_neg_integer()}],
    savers = [] :: [#saver{}],
    %% Who waits for the end of which saves.
    flushing = #{} :: #{atom() => [non_neg_integer()]},
    loading = #{} :: #{atom() => {id(), non_neg_integer()}},
    %% What is stored, by the number of its save, and the saves that will fail.
    files = #{} :: #{id() => {N :: non_neg_integer(), Size :: pos_integer()}},
    failing = [] :: [id()],
    counts = #{saves => 0, save_errors => 0, dropped => 0, refused => 0, owner_died => 0,
               saved_by_host => 0, dropped_by_host => 0, duplicates_by_host => 0} ::
        #{atom() => non_neg_integer()},
    logged = [] :: [{id(), failed | killed}],
    clock = 0 :: non_neg_integer(),
    %% What the latest step gave to whom, and what it returns itself.
    answers = #{} :: #{atom() => term()},
    result = ok :: term()
}).

%%% What runs

behind_test_() ->
    machine_test({fun setup_all/0, fun teardown_all/1}, prop_behind(), ?SEQUENCES, 200,
                 [{max_size, 84}]).

%% Writers and savers are killed on purpose.
setup_all() ->
    Level = silence(),
    Base = temporary_dir(?MODULE),
    ?MODULE = ets:new(?MODULE, [named_table, public]),
    ok = start_writer(1),
    lists:foreach(fun(Store) ->
        ok = file:make_dir(root_of(Store, Base)),
        {ok, _} = erllama_cache_store:start_link(Store, #{root => root_of(Store, Base)})
    end, ?STORES),
    persistent_term:put(?MODULE, Base),
    {Level, Base}.

teardown_all({Level, Base}) ->
    lists:foreach(fun erllama_cache_test_util:stop/1, [?WRITER | ?STORES]),
    true = ets:delete(?MODULE),
    _ = persistent_term:erase(?MODULE),
    ok = file:del_dir_r(Base),
    ok = unsilence(Level).

root_of(Store, Base) -> filename:join(Base, Store).
root_of(Store) -> root_of(Store, persistent_term:get(?MODULE)).

prop_behind() ->
    property(?MODULE, fun run/1).

run(Commands) ->
    setup(),
    with_log(fun() ->
        try run_commands(?MODULE, Commands) of
            {_History, Model, ok} ->
                wind_up(Model);
            {History, _Model, Result} ->
                {Result, story(Commands, History)}
        after
            teardown()
        end
    end).

%% What was done, with what came of it.
story(Commands, History) ->
    Results = [Result || {_State, Result} <- History],
    Calls = [{Step, Args} || {set, _, {call, _, Step, Args}} <- Commands],
    lists:zip(lists:sublist(Calls, length(Results)), Results).

setup() ->
    ok = ?WRITER:set_max_concurrent(1),
    true = ets:delete_all_objects(?MODULE),
    %% Keys of this sequence alone: a reservation whose saver was killed is noticed later.
    _ = put(sequence, erlang:unique_integer([positive])),
    _ = put(counted, counts()),
    _ = put(logged, []),
    [put(Name, {actor(), none}) || Name <- ?HOLDERS ++ ?CALLERS],
    ok.

%% Lets everything end as it does when the slots become free, and looks at what is left.
wind_up(#model{server = Server, limit = Limit} = Model) ->
    Starts = [{start_writer, [Limit]} || Server =:= down],
    Ended = lists:foldl(fun in_the_end/2, Model, Starts ++ [{drop_holder, [H]} || H <- ?HOLDERS]),
    case Ended of
        #model{queue = [], savers = [], files = Files} ->
            ok = ?WRITER:flush(infinity),
            Wanted = {[loaded(Id, Ended) || Id <- ids()], maps:keys(Files), 0},
            case matches(Wanted, fun() -> {[load(Id, memory) || Id <- ids()], on_disk(),
                                           open_files()} end, ?DEADLINE) of
                true -> passed;
                false -> wrong_in_the_end
            end;
        Wrong ->
            Wrong
    end.

in_the_end({Step, Args}, #model{} = Model) ->
    Call = {call, ?MODULE, Step, Args},
    case postcondition(Model, Call, apply(?MODULE, Step, Args)) of
        true -> next_state(Model, ok, Call);
        false -> {wrong_in_the_end, Step, Args}
    end;
in_the_end(_, Wrong) ->
    Wrong.

teardown() ->
    [kill(pid(Name)) || Name <- ?HOLDERS ++ ?CALLERS],
    _ = whereis(?WRITER) =:= undefined andalso start_writer(1),
    eventually(fun() -> {?WRITER:current(), ?WRITER:waiters()} =:= {0, []} end, ?DEADLINE),
    ok = ?WRITER:flush(infinity),
    [ok = file:delete(filename:join(root_of(Store), Name))
     || Store <- ?STORES, Name <- files(root_of(Store))],
    flush_messages().

flush_messages() ->
    receive
        _ -> flush_messages()
    after 0 -> ok
    end.

%%% The model

initial_state() ->
    #model{}.

next_state(#model{clock = Clock} = Model, _Result, {call, ?MODULE, Step, Args}) ->
    modelled(Step, Args, Model#model{clock = Clock + 1, answers = #{}, result = ok}).

modelled(hold, [_Holder], #model{server = down} = Model) ->
    Model#model{result = noproc};
modelled(hold, [Holder], #model{holds = Holds} = Model) ->
    case is_free(Model) of
        true -> Model#model{holds = [Holder | Holds]};
        false -> (add(refused, Model))#model{result = {error, max_concurrent}}
    end;
modelled(release, [Holder], #model{holds = Holds} = Model) ->
    serve(Model#model{holds = lists:delete(Holder, Holds)});
modelled(drop_holder, [Holder], #model{holds = Holds} = Model) ->
    case lists:member(Holder, Holds) of
        true -> modelled(release, [Holder], add(owner_died, Model));
        false -> Model
    end;
modelled(save, [Caller, Id, Reason, Size, N], Model) ->
    case place(Reason, Size) of
        behind -> save_behind(Caller, Id, Size, N, Model);
        {in_line, Waits} -> save_in_line(Caller, Id, Size, N, Waits, Model)
    end;
modelled(fail_late, [Id], #model{failing = Failing} = Model) ->
    Model#model{failing = lists:usort([Id | Failing])};
modelled(load, [Id, How], Model) ->
    Model#model{result = case {listed(Id, Model), How} of
        {[_], on_disk} -> {error, timeout};
        {[#saver{n = N, size = Size}], _} -> {ok, payload(N, Size)};
        {[], _} -> loaded(Id, Model)
    end};
modelled(load_after, [Caller, Id], #model{loading = Loading} = Model) ->
    case listed(Id, Model) of
        [#saver{n = N}] -> Model#model{loading = Loading#{Caller => {Id, N}}};
        [] -> answer(Caller, loaded(Id, Model), Model)
    end;
modelled(flush, [], Model) ->
    case pending(Model) of
        [] -> Model;
        Pending -> Model#model{result = {error, {pending, length(Pending)}}}
    end;
modelled(flush, [Caller], #model{flushing = Flushing} = Model) ->
    case pending(Model) of
        [] -> answer(Caller, ok, Model);
        Pending -> Model#model{flushing = Flushing#{Caller => [N || #saver{n = N} <- Pending]}}
    end;
modelled(delete, [Id], #model{files = Files} = Model) ->
    Model#model{files = maps:remove(Id, Files)};
modelled(die, [Caller], #model{queue = Queue, flushing = Flushing, loading = Loading} = Model) ->
    Model#model{
        queue = lists:keydelete(Caller, 1, Queue),
        flushing = maps:remove(Caller, Flushing),
        loading = maps:remove(Caller, Loading)
    };
modelled(kill_saver, [Id], #model{savers = Savers} = Model) ->
    {value, Saver, Others} = lists:keytake(Id, #saver.id, Savers),
    ended(Saver, dropped(Saver, killed, Model#model{savers = Others}));
modelled(kill_owner, [Id], #model{savers = Savers} = Model) ->
    Saver = lists:keyfind(Id, #saver.id, Savers),
    Alone = Saver#saver{owned = false, listed = false},
    ended(Saver, Model#model{savers = lists:keyreplace(Id, #saver.id, Savers, Alone)});
modelled(kill_pending_set, [], #model{savers = Savers, flushing = Flushing} = Model) ->
    Told = lists:foldl(fun(Caller, M) -> answer(Caller, ok, M) end, Model, maps:keys(Flushing)),
    Told#model{savers = [Saver#saver{listed = false} || Saver <- Savers], flushing = #{}};
modelled(set_limit, [Limit], Model) ->
    serve(Model#model{limit = Limit});
modelled(lose_writer, [], Model) ->
    Model#model{server = down};
modelled(stop_writer, [], #model{queue = Queue, savers = Savers} = Model) ->
    Refused = lists:foldl(fun({Caller, _, _, _}, M) -> answer(Caller, noproc, M) end,
                          Model#model{server = down, queue = [], savers = []}, Queue),
    %% They need no slots any more.
    lists:foldl(fun finish/2, Refused, Savers);
modelled(start_writer, [Limit], Model) ->
    serve(Model#model{server = up, limit = Limit}).

place(continued, Size) when Size =< ?SAVE_BYTES -> behind;
place(continued, _Size) -> {in_line, at_most_0};
place(evict, _Size) -> {in_line, as_long_as_it_takes}.

save_behind(Caller, Id, Size, N, #model{server = Server, savers = Savers} = Model) ->
    case {listed(Id, Model), has_place(Size, Model)} of
        {[_], _} ->
            answer(Caller, {error, already_present}, add(duplicates_by_host, Model));
        {[], false} ->
            answer(Caller, {error, max_concurrent}, add(refused, Model));
        {[], true} when Server =:= down ->
            answer(Caller, noproc, Model);
        {[], true} ->
            case reserve(Id, Model) of
                ok ->
                    Saver = #saver{id = Id, size = Size, n = N},
                    serve(answer(Caller, ok, Model#model{savers = Savers ++ [Saver]}));
                {Error, Refused} ->
                    answer(Caller, Error, Refused)
            end
    end.

has_place(Size, Model) ->
    Pending = pending(Model),
    length(Pending) < ?MAX andalso Size + bytes(Pending) =< ?MAX_BYTES.

save_in_line(Caller, _Id, _Size, _N, _Waits, #model{server = down} = Model) ->
    answer(Caller, noproc, Model);
save_in_line(Caller, Id, Size, N, Waits, #model{queue = Queue} = Model) ->
    case is_free(Model) of
        true -> in_line({Caller, Id, Size, N}, Model);
        false when Waits =:= at_most_0 ->
            answer(Caller, {error, max_concurrent}, add(refused, Model));
        false ->
            Model#model{queue = Queue ++ [{Caller, Id, Size, N}]}
    end.

in_line({Caller, Id, Size, N}, Model) ->
    case reserve(Id, Model) of
        ok ->
            {Outcome, Saved} = write(Id, Size, N, Model),
            answer(Caller, Outcome, Saved);
        {Error, Refused} ->
            answer(Caller, Error, Refused)
    end.

reserve(Id, #model{files = Files, savers = Savers} = Model) ->
    Present = is_map_key(Id, Files) orelse lists:keymember(Id, #saver.id, pending(Model)),
    case {Present, lists:keymember(Id, #saver.id, Savers)} of
        {true, _} -> {{error, already_present}, add(duplicates_by_host, Model)};
        {_, true} -> {{error, conflict}, add(save_errors, Model)};
        _ -> ok
    end.

write(Id, Size, N, #model{files = Files, failing = Failing} = Model) ->
    case lists:member(Id, Failing) of
        true ->
            {failed, add(save_errors, Model#model{failing = lists:delete(Id, Failing)})};
        false ->
            Saved = Model#model{files = Files#{Id => {N, Size}}},
            {ok, add(saved_by_host, add(saves, Saved))}
    end.

%% Who waits is served, one after the other.
serve(#model{queue = Queue, savers = Savers} = Model) ->
    case {is_free(Model), Queue, Savers} of
        {true, [Save | Rest], _} -> serve(in_line(Save, Model#model{queue = Rest}));
        {true, [], [Saver | Rest]} -> serve(finish(Saver, Model#model{savers = Rest}));
        _ -> Model
    end.

is_free(#model{limit = Limit, holds = Holds}) ->
    length(Holds) < Limit.

finish(#saver{id = Id, size = Size, n = N} = Saver, Model) ->
    ended(Saver, case write(Id, Size, N, Model) of
        {ok, Saved} -> Saved;
        {failed, Failed} -> dropped(Saver, failed, Failed)
    end).

%% Without an owner, nobody says so.
dropped(#saver{owned = false}, _Why, Model) ->
    Model;
dropped(#saver{id = Id}, Why, #model{logged = Logged} = Model) ->
    add(dropped, add(dropped_by_host, Model#model{logged = lists:sort([{Id, Why} | Logged])})).

%% Tells those who wait for a save that its owner has ended.
ended(#saver{n = N}, #model{flushing = Flushing, loading = Loading} = Model) ->
    Flushed = maps:map(fun(_Caller, Ns) -> lists:delete(N, Ns) end, Flushing),
    Told = maps:fold(fun(Caller, Ns, M) ->
        case Ns of
            [] -> answer(Caller, ok, M#model{flushing = maps:remove(Caller, M#model.flushing)});
            _ -> M
        end
    end, Model#model{flushing = Flushed}, Flushed),
    maps:fold(fun
        (Caller, {Id, Awaited}, M) when Awaited =:= N ->
            answer(Caller, loaded(Id, M), M#model{loading = maps:remove(Caller, M#model.loading)});
        (_Caller, _Another, M) ->
            M
    end, Told, Loading).

loaded(Id, #model{files = Files}) ->
    case Files of
        #{Id := {N, Size}} -> {ok, payload(N, Size)};
        #{} -> miss
    end.

listed(Id, Model) ->
    [Saver || #saver{id = SaverId} = Saver <- pending(Model), SaverId =:= Id].

pending(#model{savers = Savers}) ->
    [Saver || #saver{listed = true} = Saver <- Savers].

bytes(Savers) ->
    lists:sum([Size || #saver{size = Size} <- Savers]).

add(What, #model{counts = Counts} = Model) ->
    Model#model{counts = maps:update_with(What, fun(N) -> N + 1 end, Counts)}.

answer(Caller, Answer, #model{answers = Answers} = Model) ->
    Model#model{answers = Answers#{Caller => Answer}}.

idle(#model{queue = Queue, flushing = Flushing, loading = Loading}) ->
    [Caller || Caller <- ?CALLERS, not lists:keymember(Caller, 1, Queue),
               not is_map_key(Caller, Flushing), not is_map_key(Caller, Loading)].

%%% Generators

command(#model{clock = N, holds = Holds, limit = Limit, server = Server} = Model) ->
    Idle = idle(Model),
    Waiting = [Id || #saver{id = Id} <- Model#model.savers],
    Owned = [Id || #saver{id = Id, owned = true} <- Model#model.savers],
    Stored = maps:keys(Model#model.files),
    Up = Server =:= up,
    frequency(
        [{8, do(hold, [oneof(Free)])} || Free <- [?HOLDERS -- Holds], Free =/= [], Up] ++
        [{4, do(release, [oneof(Holds)])} || Holds =/= []] ++
        [{1, do(drop_holder, [oneof(?HOLDERS)])}] ++
        [{24, do(save, [oneof(Idle), id(), continued, size(), N])} || Idle =/= []] ++
        [{4, do(save, [oneof(Idle), id(), evict, size(), N])} || Idle =/= []] ++
        [{2, do(fail_late, [id()])}] ++
        [{2, do(fail_late, [oneof(Waiting)])} || Waiting =/= []] ++
        [{6, do(load, [id(), oneof([memory, store, on_disk])])}] ++
        [{4, do(load, [oneof(Waiting), oneof([memory, store, on_disk])])} || Waiting =/= []] ++
        [{3, do(load_after, [oneof(Idle), oneof(Owned)])} || Idle =/= [], Owned =/= []] ++
        [{2, do(flush, [])}] ++
        [{3, do(flush, [oneof(Idle)])} || Idle =/= []] ++
        [{6, do(delete, [oneof(Stored)])} || Stored =/= []] ++
        [{2, do(die, [oneof(?CALLERS)])}] ++
        [{4, do(kill_saver, [oneof(Waiting)])} || Waiting =/= []] ++
        [{2, do(kill_owner, [oneof(Owned)])} || Owned =/= []] ++
        [{1, do(kill_pending_set, [])}] ++
        %% By one, so that not two slots become free at once.
        [{1, do(set_limit, [Limit + 1])} || Limit < 3] ++
        [{2, do(set_limit, [Limit - 1])} || Limit > 1] ++
        [{1, do(lose_writer, [])} || Up] ++
        [{1, do(stop_writer, [])} || Up] ++
        [{20, do(start_writer, [Limit])} || not Up]
    ).

do(Step, Args) ->
    {call, ?MODULE, Step, Args}.

id() -> oneof(ids()).

ids() -> [{Store, Key} || Store <- ?STORES, Key <- ?KEYS].

size() -> frequency([{5, 20}, {3, 40}, {2, 60}, {1, 80}]).

precondition(#model{holds = Holds}, {call, _, hold, [Holder]}) ->
    not lists:member(Holder, Holds);
precondition(#model{holds = Holds}, {call, _, release, [Holder]}) -> lists:member(Holder, Holds);
precondition(Model, {call, _, save, [Caller | _]}) -> lists:member(Caller, idle(Model));
precondition(Model, {call, _, flush, [Caller]}) -> lists:member(Caller, idle(Model));
precondition(Model, {call, _, load_after, [Caller, _]}) -> lists:member(Caller, idle(Model));
precondition(#model{files = Files}, {call, _, delete, [Id]}) -> is_map_key(Id, Files);
precondition(#model{savers = Savers}, {call, _, kill_saver, [Id]}) ->
    lists:keymember(Id, #saver.id, Savers);
precondition(#model{savers = Savers}, {call, _, kill_owner, [Id]}) ->
    lists:any(fun(Saver) -> {Saver#saver.id, Saver#saver.owned} =:= {Id, true} end, Savers);
precondition(#model{limit = Limit}, {call, _, set_limit, [Next]}) -> abs(Limit - Next) =:= 1;
precondition(#model{limit = Limit, server = Server}, {call, _, start_writer, [Same]}) ->
    Server =:= down andalso Limit =:= Same;
precondition(#model{server = Server}, {call, _, Step, []})
    when Step =:= lose_writer; Step =:= stop_writer
->
    Server =:= up;
precondition(_, _) ->
    true.

%%% The writer beside the model

%% An answer that comes too early or too often is one that nobody expects.
postcondition(Model, {call, _, _Step, _} = Call, Result) ->
    Expected = next_state(Model, Result, Call),
    #model{answers = Answers, result = Wanted} = Expected,
    Given = maps:map(fun(Caller, _) -> await_answer(Caller) end, Answers),
    matches({Answers, Wanted, picture(Expected), []}, fun() ->
        Observed = observed(),
        {Given, Result, Observed, own_messages()}
    end, ?DEADLINE).

picture(#model{limit = Limit, holds = Holds, queue = Queue, savers = Savers, counts = Counts,
               logged = Logged, files = Files} = Model) ->
    Pending = pending(Model),
    #{
        slots => {length(Holds), Limit},
        waiters =>
            [{pid(Caller), Size, false} || {Caller, _Id, Size, _N} <- Queue] ++
            [{saver(Id), Size, Listed} || #saver{id = Id, size = Size, listed = Listed} <- Savers],
        pending => {length(Pending), bytes(Pending)},
        counts => Counts,
        logged => Logged,
        files => lists:sort(maps:keys(Files))
    }.

observed() ->
    #{current := Current, limit := Limit, pending := Pending, pending_bytes := Bytes} =
        ?WRITER:info(),
    _ = put(logged, lists:sort(reports() ++ get(logged))),
    #{
        slots => {Current, Limit},
        waiters => [{Pid, Size, Behind}
                    || #{pid := Pid, bytes := Size, behind := Behind} <- ?WRITER:waiters()],
        pending => {Pending, Bytes},
        counts => maps:map(fun(What, N) -> N - map_get(What, get(counted)) end, counts()),
        logged => get(logged),
        files => on_disk()
    }.

%% They outlive the writers and, but for the host's, the sequences.
counts() ->
    Host = [{Name, ets:lookup_element(?MODULE, Counter, 2)}
            || {Name, Counter} <- [{saved_by_host, saved}, {dropped_by_host, dropped},
                                   {duplicates_by_host, duplicate_dropped}],
               ets:update_counter(?MODULE, Counter, 0, {Counter, 0}) >= 0],
    maps:merge(maps:with([saves, save_errors, dropped, refused, owner_died], ?WRITER:info()),
               maps:from_list(Host)).

reports() ->
    receive
        {logged, error, #{event := save_dropped, tier_srv := Store, key := Hex, reason := Why}} ->
            [{{Store, number(binary:decode_hex(Hex))}, why(Why)} | reports()];
        {logged, _Level, Another} ->
            [Another | reports()]
    after 0 -> []
    end.

why({raised, error, fails_late, _Stack}) -> failed;
why({saver_died, killed}) -> killed;
why(Another) -> Another.

on_disk() ->
    lists:sort([Id || {Store, _} = Id <- ids(), lists:member(name(Id), files(root_of(Store)))]).

name({Store, Key}) ->
    filename:basename(file_of(root_of(Store), key(Key))).

%% Of the files that are being written.
open_files() ->
    #{tmp := Tmp} = erllama_cache_nif:live_objects(),
    Tmp.

%%% Steps

hold(Holder) ->
    step(fun() -> call(Holder, fun() -> ?WRITER:acquire(0) end) end).

release(Holder) ->
    step(fun() -> call(Holder, fun() -> ?WRITER:release() end) end).

drop_holder(Holder) ->
    die(Holder).

save(Caller, {Store, Key}, Reason, Size, N) ->
    begin_call(Caller, fun() ->
        Meta = (meta(Key))#{save_reason := Reason},
        ?WRITER:save(Store, disk, Meta, payload(N, Size), 0)
    end).

%% The next save that has reserved this key will fail.
fail_late({Store, Key}) ->
    step(fun() -> true = ets:insert(?MODULE, {{fails, Store, key(Key)}}), ok end).

load({Store, Key}, memory) ->
    step(fun() -> outcome({returned, erllama_cache_reader:load(Store, key(Key))}) end);
load({Store, Key}, store) ->
    step(fun() -> outcome({returned, erllama_cache_store:load(Store, key(Key))}) end);
load({Store, Key}, on_disk) ->
    step(fun() -> outcome({returned, load_waiting(Store, key(Key), 0)}) end).

load_after(Caller, {Store, Key}) ->
    Binary = key(Key),
    begin_call(Caller, fun() -> load_waiting(Store, Binary, infinity) end).

load_waiting(Store, Binary, Wait) ->
    erllama_cache_reader:load(Store, Binary, #{wait => Wait}).

flush() ->
    step(fun() -> ?WRITER:flush(0) end).

flush(Caller) ->
    begin_call(Caller, fun() -> ?WRITER:flush(infinity) end).

delete({Store, Key}) ->
    step(fun() -> erllama_cache_store:delete(Store, key(Key)) end).

%% Another takes its name.
die(Name) ->
    step(fun() -> ok = kill(pid(Name)), _ = put(Name, {actor(), none}), ok end).

kill_saver(Id) ->
    step(fun() -> kill(saver(Id)) end).

kill_owner(Id) ->
    step(fun() -> {parent, Owner} = process_info(saver(Id), parent), kill(Owner) end).

kill_pending_set() ->
    step(fun() ->
        case whereis(?PENDING) of
            undefined -> ok;
            Pid -> kill(Pid)
        end
    end).

set_limit(Limit) ->
    step(fun() -> ?WRITER:set_max_concurrent(Limit) end).

%% Nobody refuses its waiters after a minute, when another may have been lost.
lose_writer() ->
    step(fun() ->
        Writer = whereis(?WRITER),
        {monitored_by, Watchers} = process_info(Writer, monitored_by),
        [kill(Pid) || Pid <- Watchers ++ [Writer], is_pid(Pid)],
        ok
    end).

stop_writer() ->
    step(fun() -> gen_server:stop(?WRITER) end).

start_writer(Limit) ->
    step(fun() ->
        {ok, Pid} = ?WRITER:start_link(#{
            host => ?MODULE, max_concurrent => Limit,
            write_behind => #{
                reasons => [continued], max => ?MAX, max_bytes => ?MAX_BYTES,
                save_bytes => ?SAVE_BYTES, slot_ms => infinity
            }
        }),
        true = unlink(Pid),
        ok
    end).

%%% Callers

pid(Name) ->
    {Pid, _} = get(Name),
    Pid.

call(Name, Fun) ->
    ok = begin_call(Name, Fun),
    await_answer(Name).

begin_call(Name, Fun) ->
    Sequence = get(sequence),
    Pid = pid(Name),
    _ = put(Name, {Pid, tell(Pid, fun() -> _ = put(sequence, Sequence), Fun() end)}),
    ok.

await_answer(Name) ->
    {_, Ref} = get(Name),
    receive
        {Ref, Outcome} -> outcome(Outcome)
    after ?DEADLINE -> none
    end.

outcome({returned, {ok, _Key}}) -> ok;
outcome({returned, {ok, _Info, Payload}}) -> {ok, Payload};
outcome({returned, Result}) -> Result;
outcome({exit, {noproc, _}}) -> noproc;
outcome({error, fails_late}) -> failed;
outcome(Raised) -> Raised.

meta(Key) ->
    erllama_cache_test_util:meta([get(sequence), Key]).

key(Key) ->
    {ok, Binary} = erllama_cache_store:key(meta(Key)),
    Binary.

number(Binary) ->
    hd([Key || Key <- ?KEYS, key(Key) =:= Binary] ++ [Binary]).

payload(N, Size) ->
    <<N:32, 0:(8 * (Size - 4))>>.

%% Who has reserved a key last.
saver({Store, Key}) ->
    ets:lookup_element(?MODULE, {reserved, Store, key(Key)}, 2).

%%% The host

identify(KeyedBy, Meta) ->
    erllama_cache_store:identify(KeyedBy, Meta).

reserve(Store, Tier, Binary, Size) ->
    Reserved = erllama_cache_store:reserve(Store, Tier, Binary, Size),
    _ = is_tuple(Reserved) andalso element(1, Reserved) =:= ok andalso
        ets:insert(?MODULE, {{reserved, Store, Binary}, self()}),
    Reserved.

root(Store) ->
    erllama_cache_store:root(Store).

check(Store, Binary, Token) ->
    case ets:take(?MODULE, {fails, Store, Binary}) of
        [] -> erllama_cache_store:check(Store, Binary, Token);
        [_] -> error(fails_late)
    end.

mark_published(Store, Binary, Token, Root) ->
    erllama_cache_store:mark_published(Store, Binary, Token, Root).

announce(Store, Binary, Token, Size, Header, Content) ->
    erllama_cache_store:announce(Store, Binary, Token, Size, Header, Content).

cancel(Store, Binary, Token) ->
    erllama_cache_store:cancel(Store, Binary, Token).

count(Store, Event) ->
    Counter = case Event of
        {saved, _Reason} -> saved;
        _ -> Event
    end,
    _ = ets:update_counter(?MODULE, Counter, 1, {Counter, 0}),
    erllama_cache_store:count(Store, Event).
