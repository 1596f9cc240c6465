%% The semaphore against a model of it: five processes take and give back slots and die, limits
%% change, the server comes and goes, in any order; after each step the semaphore is what the model
%% says, and everybody has been answered who should have been, and nobody else.
%%
%% A time-out is a step of its own, so that it too happens where the model says: a client that is
%% to time out is suspended as soon as it is queued, and resumed by `wake'.
-module(prop_semaphore_tests).
-behaviour(proper_statem).

%% Before eunit.hrl, which leaves alone what this has defined.
-include_lib("proper/include/proper.hrl").
-include_lib("eunit/include/eunit.hrl").

-export([prop_semaphore/0]).
-export([initial_state/0, command/1, precondition/2, next_state/3, postcondition/3]).
%% The steps.
-export([take/3, doze/2, wake/1, release/1, leave/2, die/2, drop_guard/1]).
-export([set_limit/1, set_max_bytes/1, start_server/2, lose_server/1, stop_server/0]).
%% The host of the clients' saves.
-export([identify/2]).

-import(erllama_cache_statem_util, [machine_test/5, property/2, matches/3, step/1]).
-import(erllama_cache_test_util, [eventually/2, own_messages/0, meta/0]).

-define(WRITER, erllama_cache_writer).
-define(SEQUENCES, 1500).
-define(CLIENTS, [a, b, c, d, e]).
-define(FIRST_LIMIT, 2).
%% No limit here is this high: a probe that asks for it learns whether the semaphore is open, and
%% changes nothing.
-define(NEVER, 16#7fffffff).
%% What nothing here waits out.
-define(LONG, 600000).
%% How long whatever is to happen may take. Short, because shrinking waits it out again and again.
-define(DEADLINE, 3000).

%%% What runs

%% Servers crash on purpose. Sequences are of twice the usual length.
semaphore_test_() ->
    machine_test({fun erllama_cache_test_util:silence/0, fun erllama_cache_test_util:unsilence/1},
                 prop_semaphore(), ?SEQUENCES, 50, [{max_size, 84}]).

prop_semaphore() ->
    property(?MODULE, fun run/1).

run(Commands) ->
    setup(),
    try run_commands(?MODULE, Commands) of
        {History, Model, Result} ->
            case {Result, left_behind(Model)} of
                {ok, []} -> passed;
                {_, Left} -> {Result, {left_behind, Left}, {last, lists:last([none | History])}}
            end
    after
        teardown()
    end.

setup() ->
    ok = start_server(?FIRST_LIMIT, infinity),
    _ = put(counted, counts(?WRITER:info())),
    lists:foreach(fun new_client/1, ?CLIENTS).

%% What no client may have after a run: messages nobody waits for, dictionary entries but the one.
left_behind(Model) ->
    [
        {Client, Left}
     || Client <- ?CLIENTS,
        not is_map_key(Client, asleep(Model)),
        Left <- left_behind_by(pid(Client))
    ].

left_behind_by(Pid) ->
    [{messages, Messages}, {dictionary, Dictionary}] =
        process_info(Pid, [messages, dictionary]),
    [{message, Message} || Message <- Messages] ++
        [{entries, Dictionary} || length(Dictionary) > 1].

teardown() ->
    lists:foreach(fun(Client) -> ok = stop(pid(Client), kill) end, ?CLIENTS),
    eventually(fun() ->
        #{current := Current, waiting := Waiting, inflight_bytes := Bytes} = ?WRITER:info(),
        {Current, Waiting, Bytes, ?WRITER:holders(), ?WRITER:waiters()} =:= {0, 0, 0, [], []}
    end, ?DEADLINE),
    %% Who was granted a slot by another's death may have said so before its own.
    flush(),
    erllama_cache_test_util:stop(?WRITER).

flush() ->
    receive
        {answer, _, _} -> flush()
    after 0 -> ok
    end.

%%% The model

%% What is asked for: acquire/1,2, with_slot/2, save/5, or a slot in the last lane, with the way in
%% which that wait is given up. with_slot/2 and save/5 have a scope: the slot is theirs until they
%% are left.
-type call() ::
    {acquire, Weight :: pos_integer()} | with_slot | {save, Bytes :: non_neg_integer()} |
    {last, Weight :: pos_integer(), Bytes :: non_neg_integer(), return | throw}.
-type client() :: a | b | c | d | e.
-type answer() :: ok | entered | left | noproc | {error, max_concurrent | weight_exceeds_limit}.

-record(model, {
    open = true :: boolean(),
    limit = ?FIRST_LIMIT :: pos_integer(),
    max_bytes = infinity :: non_neg_integer() | infinity,
    %% The latest first.
    holds = maps:from_list([{C, []} || C <- ?CLIENTS]) :: #{client() => [call()]},
    scopes = maps:from_list([{C, 0} || C <- ?CLIENTS]) :: #{client() => non_neg_integer()},
    %% The next to be served first.
    queue = [] :: [{client(), call()}],
    %% Clients that are suspended, and what they will find when they wake.
    asleep = #{} :: #{client() => time_out | answer()},
    counts = #{granted => 0, timed_out => 0, owner_died => 0, waited => 0} ::
        #{atom() => non_neg_integer()},
    %% What the latest step gave to whom.
    answers = #{} :: #{client() => answer()}
}).

initial_state() ->
    #model{}.

next_state(Model, _Result, {call, ?MODULE, Step, Args}) ->
    modelled(Step, Args, Model#model{answers = #{}}).

modelled(take, [Client, Call, Timeout], Model) ->
    case attempt(Call, Model) of
        granted -> answer(Client, granted_answer(Call), hold(Client, Call, Model));
        busy when Timeout =:= 0 -> answer(Client, {error, max_concurrent}, gave_up(Call, Model));
        busy -> enqueue(Client, Call, Model);
        Refusal -> answer(Client, Refusal, Model)
    end;
modelled(doze, [Client, Call], Model) ->
    Queued = modelled(take, [Client, Call, infinity], Model),
    Queued#model{asleep = (asleep(Queued))#{Client => time_out}};
modelled(wake, [Client], #model{asleep = Asleep} = Model) ->
    Woken = Model#model{asleep = maps:remove(Client, Asleep)},
    case Asleep of
        #{Client := time_out} ->
            Left = count(timed_out, 1, unqueue(Client, Woken)),
            hand_on(answer(Client, {error, max_concurrent}, Left));
        #{Client := Answer} ->
            answer(Client, Answer, Woken)
    end;
modelled(release, [Client], Model) ->
    hand_on(answer(Client, ok, pop_hold(Client, Model)));
modelled(leave, [Client, _How], #model{scopes = Scopes} = Model) ->
    Left = Model#model{scopes = maps:update_with(Client, fun(Depth) -> Depth - 1 end, Scopes)},
    hand_on(answer(Client, left, pop_hold(Client, Left)));
modelled(die, [Client, How], #model{holds = Holds, scopes = Scopes, asleep = Asleep} = Model) ->
    #{Client := Held} = Holds,
    #{Client := Depth} = Scopes,
    Died =
        case How of
            %% The scopes have given theirs back on the way out.
            normal -> max(0, length(Held) - Depth);
            _ -> length(Held)
        end,
    Gone = Model#model{
        holds = Holds#{Client := []},
        scopes = Scopes#{Client := 0},
        asleep = maps:remove(Client, Asleep)
    },
    hand_on(count(owner_died, Died, unqueue(Client, Gone)));
modelled(drop_guard, [Client], #model{holds = Holds} = Model) ->
    hand_on(answer(Client, ok, Model#model{holds = Holds#{Client := []}}));
modelled(set_limit, [Limit], Model) ->
    limit(Limit, Model);
modelled(set_max_bytes, [MaxBytes], Model) ->
    hand_on(Model#model{max_bytes = MaxBytes});
modelled(start_server, [Limit, MaxBytes], #model{open = false} = Model) ->
    limit(Limit, Model#model{open = true, max_bytes = MaxBytes});
modelled(start_server, _, Model) ->
    Model;
modelled(lose_server, _, Model) ->
    Model#model{open = false};
modelled(stop_server, [], #model{queue = Queue} = Model) ->
    Closed = Model#model{open = false, queue = []},
    lists:foldl(fun({Client, _}, M) -> decide(Client, noproc, M) end, Closed, Queue).

attempt(_Call, #model{open = false}) ->
    noproc;
attempt(Call, #model{limit = Limit} = Model) ->
    case weight(Call) > Limit of
        true -> {error, weight_exceeds_limit};
        false ->
            {Ahead, _} = split_queue(Call, Model),
            case Ahead =:= [] andalso fits(Call, Model) of
                true -> granted;
                false -> busy
            end
    end.

%% Who waits to be served before one who comes now, and who after.
split_queue(Call, #model{queue = Queue}) ->
    lists:splitwith(fun({_, Queued}) -> lane(Queued) =< lane(Call) end, Queue).

enqueue(Client, Call, Model) ->
    {Ahead, Behind} = split_queue(Call, Model),
    Model#model{queue = Ahead ++ [{Client, Call} | Behind]}.

%% Without patience, only who waits in the last lane has queued at all.
gave_up({last, _, _, _}, Model) -> count(timed_out, 1, Model);
gave_up(_, Model) -> Model.

fits(Call, #model{limit = Limit, max_bytes = MaxBytes} = Model) ->
    Bytes = bytes(Call),
    Inflight = held_bytes(Model),
    held(Model) + weight(Call) =< Limit andalso
        (Bytes =:= 0 orelse Inflight =:= 0 orelse MaxBytes =:= infinity orelse
            Inflight + Bytes =< MaxBytes).

hand_on(#model{queue = [{Client, Call} | Rest]} = Model) ->
    case fits(Call, Model) of
        true ->
            Granted = hold(Client, Call, Model#model{queue = Rest}),
            hand_on(decide(Client, granted_answer(Call), count(waited, 1, Granted)));
        false ->
            Model
    end;
hand_on(Model) ->
    Model.

limit(Limit, #model{queue = Queue} = Model) ->
    {TooHeavy, Rest} = lists:partition(fun({_, Call}) -> weight(Call) > Limit end, Queue),
    Refuse = fun({Client, _}, M) -> decide(Client, {error, weight_exceeds_limit}, M) end,
    hand_on(lists:foldl(Refuse, Model#model{limit = Limit, queue = Rest}, TooHeavy)).

hold(Client, Call, #model{holds = Holds, scopes = Scopes} = Model) ->
    count(granted, 1, Model#model{
        holds = maps:update_with(Client, fun(Held) -> [Call | Held] end, Holds),
        scopes = maps:update_with(Client, fun(Depth) -> Depth + scopes(Call) end, Scopes)
    }).

pop_hold(Client, #model{holds = Holds} = Model) ->
    Pop = fun
        ([]) -> [];
        ([_ | Held]) -> Held
    end,
    Model#model{holds = maps:update_with(Client, Pop, Holds)}.

unqueue(Client, #model{queue = Queue} = Model) ->
    Model#model{queue = lists:keydelete(Client, 1, Queue)}.

%% Who waited is told, at once or when it wakes.
decide(Client, Answer, #model{asleep = Asleep} = Model) when is_map_key(Client, Asleep) ->
    Model#model{asleep = Asleep#{Client := Answer}};
decide(Client, Answer, Model) ->
    answer(Client, Answer, Model).

answer(Client, Answer, #model{answers = Answers} = Model) ->
    Model#model{answers = Answers#{Client => Answer}}.

count(What, N, #model{counts = Counts} = Model) ->
    Model#model{counts = maps:update_with(What, fun(Sofar) -> Sofar + N end, Counts)}.

weight({acquire, Weight}) -> Weight;
weight({last, Weight, _, _}) -> Weight;
weight(_) -> 1.

bytes({save, Bytes}) -> Bytes;
bytes({last, _, Bytes, _}) -> Bytes;
bytes(_) -> 0.

%% The lower one is served first.
lane({last, _, _, _}) -> 2;
lane(_) -> 1.

scopes({acquire, _}) -> 0;
scopes({last, _, _, _}) -> 0;
scopes(_) -> 1.

granted_answer(Call) ->
    case scopes(Call) of
        0 -> ok;
        1 -> entered
    end.

held(#model{holds = Holds}) ->
    lists:sum([weight(Call) || Calls <- maps:values(Holds), Call <- Calls]).

held_bytes(#model{holds = Holds}) ->
    lists:sum([bytes(Call) || Calls <- maps:values(Holds), Call <- Calls]).

asleep(#model{asleep = Asleep}) -> Asleep.

%% From OTP 28 on a suspended process's timer pauses, and erts 17.1 at least loses some that are
%% about to fire just then: who would time out there, sleeps on.
wakeful(#model{asleep = Asleep}) ->
    TimesOut = list_to_integer(erlang:system_info(otp_release)) < 28,
    [Client || {Client, Finds} <- maps:to_list(Asleep), TimesOut orelse Finds =/= time_out].

idle(#model{queue = Queue, asleep = Asleep}) ->
    [C || C <- ?CLIENTS, not lists:keymember(C, 1, Queue), not is_map_key(C, Asleep)].

in_scope(#model{scopes = Scopes} = Model) ->
    [Client || Client <- idle(Model), map_get(Client, Scopes) > 0].

holding(#model{holds = Holds} = Model) ->
    [Client || Client <- idle(Model), map_get(Client, Holds) =/= []].

%%% Generators

command(#model{open = Open} = Model) ->
    Idle = idle(Model),
    frequency(
        [{14, do(take, [oneof(Idle), call(), patience()])} || Idle =/= []] ++
        [{2, do(doze, [oneof(Idle), call()])} || Idle =/= []] ++
        [{4, do(wake, [oneof(Wakeful)])} || Wakeful <- [wakeful(Model)], Wakeful =/= []] ++
        [{9, do(release, [oneof(Holding)])} || Holding <- [holding(Model)], Holding =/= []] ++
        [{1, do(release, [oneof(Idle)])} || Idle =/= []] ++
        [{6, do(leave, [oneof(In), oneof([return, throw])])}
         || In <- [in_scope(Model)], In =/= []] ++
        [{2, do(die, [oneof(?CLIENTS), oneof([kill, suspended])])}] ++
        [{1, do(die, [oneof(Idle), normal])} || Idle =/= []] ++
        [{1, do(drop_guard, [oneof(Out)])} || Out <- [Idle -- in_scope(Model)], Out =/= []] ++
        [{3, do(set_limit, [limit()])}] ++
        [{2, do(set_max_bytes, [max_bytes()])}] ++
        [{1, do(lose_server, [oneof([kill, crash])])} || Open] ++
        [{1, do(stop_server, [])} || Open] ++
        [{case Open of true -> 1; false -> 12 end, do(start_server, [limit(), max_bytes()])}]
    ).

do(Step, Args) ->
    {call, ?MODULE, Step, Args}.

call() ->
    frequency([
        {5, {acquire, 1}},
        {3, {acquire, range(2, 4)}},
        {2, with_slot},
        {3, {save, payload()}},
        {5, {last, weighted_union([{3, 1}, {2, range(2, 4)}]), payload(), oneof([return, throw])}}
    ]).

payload() ->
    oneof([0, 30, 60, 100]).

patience() ->
    oneof([0, ?LONG, infinity]).

limit() ->
    range(1, 6).

max_bytes() ->
    oneof([0, 60, 100, infinity]).

precondition(Model, {call, _, take, [Client, _, _]}) -> lists:member(Client, idle(Model));
precondition(Model, {call, _, doze, [Client, Call]}) ->
    %% Who does not queue has nothing to time out of.
    lists:member(Client, idle(Model)) andalso attempt(Call, Model) =:= busy;
precondition(Model, {call, _, wake, [Client]}) -> lists:member(Client, wakeful(Model));
precondition(Model, {call, _, release, [Client]}) -> lists:member(Client, idle(Model));
precondition(Model, {call, _, leave, [Client, _]}) -> lists:member(Client, in_scope(Model));
precondition(Model, {call, _, die, [Client, normal]}) -> lists:member(Client, idle(Model));
precondition(Model, {call, _, drop_guard, [Client]}) ->
    %% In a scope, the guard may still be on the stack.
    lists:member(Client, idle(Model) -- in_scope(Model));
precondition(#model{open = Open}, {call, _, lose_server, _}) -> Open;
precondition(#model{open = Open}, {call, _, stop_server, _}) -> Open;
precondition(_, _) -> true.

%%% The semaphore beside the model

%% Deaths are noticed a little after they happen, so the semaphore may take a moment to be what the
%% model says. An answer that comes too early or too often is one that nobody expects.
postcondition(Model, {call, _, Step, _} = Call, Result) ->
    Expected = next_state(Model, Result, Call),
    Answers = maps:map(fun(Client, _) -> await_answer(Client) end, Expected#model.answers),
    Wanted = {Expected#model.answers, outcome(Step, Model), picture(Expected), []},
    matches(Wanted, fun() -> {Answers, Result, observed(), own_messages()} end, ?DEADLINE).

outcome(start_server, #model{open = true}) -> already_started;
outcome(_, _) -> ok.

picture(#model{open = Open, limit = Limit, max_bytes = MaxBytes, holds = Holds, queue = Queue,
               counts = Counts} = Model) ->
    Rows = [{pid(Client), weight(Call), bytes(Call)}
            || {Client, Calls} <- maps:to_list(Holds), Call <- lists:reverse(Calls)],
    Held = held(Model),
    #{
        open => Open,
        limit => {Limit, Limit},
        current => {Held, Held},
        max_inflight_bytes => MaxBytes,
        inflight_bytes => held_bytes(Model),
        waiting => length(Queue),
        counts => Counts,
        holders => lists:keysort(1, Rows),
        waiters => [{pid(Client), weight(Call), bytes(Call)} || {Client, Call} <- Queue]
    }.

observed() ->
    Info = ?WRITER:info(),
    #{limit := Limit, current := Current, max_inflight_bytes := MaxBytes, inflight_bytes := Bytes,
      waiting := Waiting} = Info,
    #{
        open => is_open(),
        limit => {Limit, ?WRITER:max_concurrent()},
        current => {Current, ?WRITER:current()},
        max_inflight_bytes => MaxBytes,
        inflight_bytes => Bytes,
        waiting => Waiting,
        counts => difference(counts(Info), get(counted)),
        %% Each process's in the order in which it acquired them.
        holders => lists:keysort(1, rows(?WRITER:holders())),
        waiters => rows(?WRITER:waiters())
    }.

is_open() ->
    try ?WRITER:acquire(0, #{weight => ?NEVER}) of
        {error, weight_exceeds_limit} -> true
    catch
        exit:{noproc, _} -> false
    end.

rows(Rows) ->
    [{Pid, Weight, Bytes} || #{pid := Pid, weight := Weight, bytes := Bytes} <- Rows].

%% The semaphore outlives its servers, and its counts do too.
counts(Info) ->
    maps:with([granted, timed_out, owner_died, waited], Info).

difference(Counts, Before) ->
    maps:map(fun(What, N) -> N - map_get(What, Before) end, Counts).

%%% Steps

take(Client, Call, Timeout) ->
    ask(Client, {take, Call, Timeout}).

%% Queues with a time-out, and sleeps through it.
doze(Client, Call) ->
    step(fun() -> doze(Client, Call, 10) end).

doze(Client, Call, Timeout) ->
    ok = take(Client, Call, Timeout),
    {Pid, Ref} = get(Client),
    Queued = fun() -> lists:any(fun(#{pid := P}) -> P =:= Pid end, ?WRITER:waiters()) end,
    Answered = fun() -> lists:keymember(Ref, 2, own_messages()) end,
    eventually(fun() -> Queued() orelse Answered() end, ?DEADLINE),
    true = erlang:suspend_process(Pid),
    case Queued() of
        true ->
            ok;
        false ->
            %% Not fast enough. That time-out is nobody's.
            true = erlang:resume_process(Pid),
            {error, max_concurrent} = await_answer(Client),
            _ = put(counted, maps:update_with(timed_out, fun(N) -> N + 1 end, get(counted))),
            doze(Client, Call, 2 * Timeout)
    end.

wake(Client) ->
    step(fun() -> true = erlang:resume_process(pid(Client)), ok end).

release(Client) ->
    ask(Client, release).

leave(Client, How) ->
    ask(Client, {leave, How}).

%% Another takes its name.
die(Client, How) ->
    step(fun() -> ok = stop(pid(Client), How), new_client(Client) end).

%% As if the garbage collector had found nobody who refers to the guard.
drop_guard(Client) ->
    ask(Client, drop_guard).

set_limit(Limit) ->
    ?WRITER:set_max_concurrent(Limit).

set_max_bytes(MaxBytes) ->
    ?WRITER:set_max_inflight_bytes(MaxBytes).

start_server(Limit, MaxBytes) ->
    Config = #{host => ?MODULE, max_concurrent => Limit, max_inflight_bytes => MaxBytes},
    step(fun() ->
        case ?WRITER:start_link(Config) of
            {ok, Pid} ->
                true = unlink(Pid),
                ok;
            {error, {already_started, _}} ->
                already_started
        end
    end).

lose_server(How) ->
    step(fun() -> end_server(How) end).

end_server(kill) ->
    stop(whereis(?WRITER), kill);
end_server(crash) ->
    Monitor = monitor(process, ?WRITER),
    ok = sys:terminate(?WRITER, crash),
    receive
        {'DOWN', Monitor, process, _, crash} -> ok
    end.

stop_server() ->
    step(fun() -> gen_server:stop(?WRITER) end).

stop(Pid, How) ->
    Monitor = monitor(process, Pid),
    true =
        case How of
            kill -> exit(Pid, kill);
            suspended -> erlang:suspend_process(Pid) andalso exit(Pid, kill);
            normal -> Pid ! finish, true
        end,
    receive
        {'DOWN', Monitor, process, Pid, _} -> ok
    end.

%%% Clients

%% A client does one thing after another; it answers when it is done, which for a waiter is late.
new_client(Client) ->
    Driver = self(),
    Pid = spawn(fun() ->
        _ = monitor(process, Driver),
        serve()
    end),
    _ = put(Client, {Pid, none}),
    ok.

pid(Client) ->
    {Pid, _} = get(Client),
    Pid.

ask(Client, Request) ->
    Pid = pid(Client),
    Ref = make_ref(),
    Pid ! {request, {self(), Ref}, Request},
    _ = put(Client, {Pid, Ref}),
    ok.

await_answer(Client) ->
    {_, Ref} = get(Client),
    receive
        {answer, Ref, Answer} -> Answer
    after ?DEADLINE -> none
    end.

%% Returns when it is told to leave the scope that it is in.
serve() ->
    receive
        {request, To, {leave, return}} -> {left, To};
        {request, To, {leave, throw}} -> throw({left, To});
        {request, To, Request} -> perform(Request, To), serve();
        finish -> exit(normal);
        {'DOWN', _, process, _, _} -> exit(normal)
    end.

perform({take, {acquire, 1}, Timeout}, To) ->
    answer_to(To, attempt(fun() -> ?WRITER:acquire(Timeout) end));
perform({take, {acquire, Weight}, Timeout}, To) ->
    answer_to(To, attempt(fun() -> ?WRITER:acquire(Timeout, #{weight => Weight}) end));
perform({take, with_slot, Timeout}, To) ->
    enter(To, fun() -> ?WRITER:with_slot(Timeout, fun() -> scope(To) end) end);
perform({take, {save, Bytes}, Timeout}, To) ->
    %% identify/2 finds in the map whom to answer.
    Meta = (meta())#{prompt_text => term_to_binary(To)},
    enter(To, fun() -> ?WRITER:save(no_store, disk, Meta, <<0:Bytes/unit:8>>, Timeout) end);
perform({take, {last, Weight, Bytes, How}, Timeout}, To) ->
    answer_to(To, attempt(fun() -> take_last(Weight, Bytes, Timeout, How) end));
perform(release, To) ->
    answer_to(To, ?WRITER:release());
perform(drop_guard, To) ->
    _ = erase('$erllama_cache_guard'),
    true = garbage_collect(),
    answer_to(To, ok).

%% As a save behind its caller does. What it does meanwhile ends the wait, when it is first done.
take_last(Weight, Bytes, Timeout, How) ->
    {error, weight_exceeds_limit} = ?WRITER:acquire(0, #{weight => ?NEVER}),
    Guard = get('$erllama_cache_guard'),
    TimedOut = {error, max_concurrent},
    Meanwhile =
        case How of
            return -> fun() -> TimedOut end;
            throw -> fun() -> throw({timed_out, TimedOut}) end
        end,
    case erllama_cache_waiter:wait_last(Guard, Weight, Bytes, Timeout, Meanwhile) of
        granted -> ok;
        {gave_up, Answer} -> Answer;
        weight_exceeds_limit -> {error, weight_exceeds_limit};
        closed -> noproc
    end.

enter(To, Fun) ->
    case attempt(Fun) of
        %% Returned, or thrown.
        {ok, {left, Leaver}} -> answer_to(Leaver, left);
        {left, Leaver} -> answer_to(Leaver, left);
        {error, {left, Leaver}} -> answer_to(Leaver, left);
        Refused -> answer_to(To, Refused)
    end.

%% The save has its slot. It gets no further than here.
identify(_KeyedBy, #{prompt_text := To}) ->
    {error, scope(binary_to_term(To))}.

scope(To) ->
    answer_to(To, entered),
    serve().

attempt(Fun) ->
    try
        Fun()
    catch
        throw:{left, _} = Left -> Left;
        throw:{timed_out, Answer} -> Answer;
        exit:{noproc, _} -> noproc
    end.

answer_to({Driver, Ref}, Answer) ->
    Driver ! {answer, Ref, Answer},
    ok.
