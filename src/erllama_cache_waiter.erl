%% Waiting in a semaphore's queue, for a process that found no slot free.
%%
%% The library answers with one message, `{Ref, Verdict}'. A process that leaves the queue either
%% withdraws before the decision, and no message will come, or takes the message: never neither.
%%
%% @private
-module(erllama_cache_waiter).

-export([wait/5]).
-export([queue/3, leave/2]).
-export_type([verdict/0]).

-type verdict() :: granted | weight_exceeds_limit | closed.

%% Waits at most `Timeout' milliseconds for so many slots and bytes, or until `Stop' says so. Unless
%% the answer is `granted', the process holds nothing of what it asked for.
-spec wait(erllama_cache_nif:guard(), pos_integer(), non_neg_integer(), timeout(),
           erllama_cache_save:stop()) ->
    verdict() | timed_out | stopped.
wait(Guard, Weight, Bytes, Timeout, Stop) ->
    case queue(Guard, Weight, Bytes) of
        {queued, Ref} -> await(Guard, Ref, Timeout, Stop);
        Verdict -> Verdict
    end.

%% Takes what is free after all, or a place in the queue.
-spec queue(erllama_cache_nif:guard(), pos_integer(), non_neg_integer()) ->
    verdict() | {queued, reference()}.
queue(Guard, Weight, Bytes) ->
    Ref = make_ref(),
    case erllama_cache_nif:acquire_or_queue(Guard, Weight, Bytes, Ref) of
        ok -> granted;
        queued -> {queued, Ref};
        Refused -> Refused
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
-spec leave(erllama_cache_nif:guard(), reference()) -> withdrawn | verdict().
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
