%% Waiting in a semaphore's queue, for a process that found no slot free.
%%
%% The library answers with one message, `{Ref, Verdict}'. A process that leaves the queue either
%% withdraws before the decision, and no message will come, or takes the message: never neither.
%%
%% @private
-module(erllama_cache_waiter).

-export([wait/5, wait_meanwhile/5, wait_last/5]).
-export_type([verdict/0, meanwhile/1]).

-type verdict() :: granted | weight_exceeds_limit | closed.
-type meanwhile(Error) :: fun(() -> ok | Error).
%% What runs now and then while a process waits. An error of it, or an exception, ends the wait.

%% Waits at most `Timeout' milliseconds for so many slots and bytes, or until `Stop' says so. Unless
%% the answer is `granted', the process holds nothing of what it asked for.
-spec wait(erllama_cache_nif:guard(), pos_integer(), non_neg_integer(), timeout(),
           erllama_cache_save:stop()) ->
    verdict() | timed_out | stopped.
wait(Guard, Weight, Bytes, Timeout, Stop) ->
    Ref = make_ref(),
    Attempt = erllama_cache_nif:acquire_or_queue(Guard, Weight, Bytes, Ref),
    decided(Attempt, measured(Weight, fun() -> await(Guard, Ref, Timeout, Stop) end)).

%% Waits for so many slots and bytes for as long as it takes, and runs `Meanwhile' every so many
%% milliseconds until it is decided. Unless the answer is `granted', the process holds nothing of
%% what it asked for.
-spec wait_meanwhile(erllama_cache_nif:guard(), pos_integer(), non_neg_integer(), timeout(),
                     meanwhile(Error)) ->
    verdict() | {gave_up, Error}.
wait_meanwhile(Guard, Weight, Bytes, Every, Meanwhile) ->
    Ref = make_ref(),
    Attempt = erllama_cache_nif:acquire_or_queue(Guard, Weight, Bytes, Ref),
    decided(Attempt, fun() -> await_decision(Guard, Ref, Every, Meanwhile) end).

%% The same in the last lane: after all that wait in the usual one.
-spec wait_last(erllama_cache_nif:guard(), pos_integer(), non_neg_integer(), timeout(),
                meanwhile(Error)) ->
    verdict() | {gave_up, Error}.
wait_last(Guard, Weight, Bytes, Every, Meanwhile) ->
    Ref = make_ref(),
    Attempt = erllama_cache_nif:acquire_or_queue_last(Guard, Weight, Bytes, Ref),
    Await = fun() -> await_decision(Guard, Ref, Every, Meanwhile) end,
    decided(Attempt, measured(Weight, Await)).

decided(ok, _Await) -> granted;
decided(queued, Await) -> Await();
decided(Refused, _Await) -> Refused.

%% A wait for a slot is an event; one for a turn, by wait_meanwhile/5, is not.
measured(Weight, Await) ->
    fun() ->
        erllama_cache_telemetry:span(wait, #{weight => Weight}, {Await, fun described/1})
    end.

described(granted) -> {#{}, #{result => ok}};
described({gave_up, _}) -> {#{}, #{result => gave_up}};
described(Verdict) -> {#{}, #{result => Verdict}}.

await_decision(Guard, Ref, Every, Meanwhile) ->
    receive
        {Ref, Verdict} -> Verdict
    after Every ->
        %% A process that did not run for long may find both, and then it is decided.
        receive
            {Ref, Verdict} -> Verdict
        after 0 -> look_up(Guard, Ref, Every, Meanwhile)
        end
    end.

look_up(Guard, Ref, Every, Meanwhile) ->
    try Meanwhile() of
        ok ->
            await_decision(Guard, Ref, Every, Meanwhile);
        Error ->
            _ = stop(Guard, Ref),
            {gave_up, Error}
    catch
        Class:Reason:Stack ->
            _ = stop(Guard, Ref),
            erlang:raise(Class, Reason, Stack)
    end.

await(Guard, Ref, Timeout, never) ->
    receive
        {Ref, Verdict} -> Verdict
    after Timeout -> time_out(Guard, Ref)
    end;
await(Guard, Ref, Timeout, {Cancel, Monitors}) ->
    receive
        {Ref, Verdict} -> Verdict;
        {erllama_cache_writer, cancel, Cancel} -> stop(Guard, Ref);
        {'DOWN', Monitor, process, _, _} when [Monitor] =:= Monitors -> stop(Guard, Ref)
    after Timeout -> time_out(Guard, Ref)
    end.

time_out(Guard, Ref) ->
    case leave(Guard, Ref) of
        withdrawn -> timed_out;
        Verdict -> Verdict
    end.

%% Leaves the queue without a slot, even if one has been granted meanwhile.
stop(Guard, Ref) ->
    case leave(Guard, Ref) of
        withdrawn ->
            stopped;
        granted ->
            _ = erllama_cache_nif:release(Guard),
            stopped;
        Refused ->
            Refused
    end.

%% Leaves the queue, or receives the decision that came first.
leave(Guard, Ref) ->
    case erllama_cache_nif:give_up(Guard) of
        withdrawn ->
            withdrawn;
        decided ->
            %% The message is in the mailbox or on its way. Left there it would stay for ever, and
            %% the slot that it grants would be lost.
            receive
                {Ref, Verdict} -> Verdict
            end
    end.
