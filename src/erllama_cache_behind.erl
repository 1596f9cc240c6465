%% Saves that go on behind their callers: `write_behind' of the writer's configuration.
%%
%% The caller computes the key and encodes the tokens. It has its answer when a saver has reserved
%% the key, and does not wait for a slot or for the disk. As with other saves in the background, an
%% owner answers for the saver, which may be killed.
%%
%% @private
-module(erllama_cache_behind).

-export([place/3, save/5, is_saver/2]).

-include("erllama_cache_log.hrl").

%% Whether a save goes on behind its caller, or else how many milliseconds it must be ready to wait
%% for a slot: a state that is about to be lost is not to be lost to a pending save.
-spec place(map(), Payload :: binary(), erllama_cache_config:write_behind()) ->
    behind | {in_line, timeout()}.
place(#{save_reason := Reason}, Payload, #{reasons := Reasons, max_bytes := MaxBytes,
                                           save_bytes := SaveBytes, slot_ms := SlotMs}) ->
    case lists:member(Reason, Reasons) of
        true when byte_size(Payload) =< SaveBytes, byte_size(Payload) =< MaxBytes -> behind;
        true -> {in_line, 0};
        false -> {in_line, SlotMs}
    end;
place(_Meta, _Payload, _Options) ->
    {in_line, 0}.

%% Answers when the key is reserved, and saves on after that. Whatever fails earlier is answered, or
%% raised, as by a save in line. `closed' when no writer runs. From the answer on, neither the
%% caller's end nor the writer's stops the save, and a failure is logged and counted.
-spec save(erllama_cache_setup:setup(), erllama_cache_host:tier_srv(), erllama_cache_host:tier(),
           erllama_cache_meta:build_meta(), Payload :: binary()) ->
    {ok, erllama_cache_writer:key()} | {error, term()} | closed.
save(#{options_behind := Options} = Setup, TierSrv, Tier, Meta, Payload) ->
    Prepare = fun() ->
        erllama_cache_save:prepare(Setup#{options := Options}, TierSrv, Tier, Meta, Payload)
    end,
    case counting_failure(Prepare) of
        {ok, Save} -> hand_over(Save, Setup);
        {error, _} = Error -> Error
    end.

%% Whether a process saves for one of these owners.
-spec is_saver(pid(), Owners :: [pid()]) -> boolean().
is_saver(_Pid, []) ->
    false;
is_saver(Pid, Owners) ->
    case process_info(Pid, parent) of
        {parent, Parent} -> lists:member(Parent, Owners);
        undefined -> false
    end.

hand_over(Save, Setup) ->
    Caller = self(),
    Owner = spawn(fun() ->
        erllama_cache_background:for_caller(Caller, fun(Ref) -> own(Ref, Save, Setup) end)
    end),
    Ref = monitor(process, Owner, [{alias, reply_demonitor}]),
    Owner ! {Caller, Ref},
    receive
        {Ref, {raised, Class, Reason, Stack}} -> erlang:raise(Class, Reason, Stack);
        {Ref, Answer} -> Answer;
        {'DOWN', Ref, process, Owner, Reason} -> {error, {saver_died, Reason}}
    end.

own(Alias, Save, #{write_behind := Bounds} = Setup) ->
    {_TierSrv, Key, _Reason} = erllama_cache_save:subject(Save),
    Scope = erllama_cache_save:scope(Save),
    Info = erllama_cache_save:info(Save),
    case erllama_cache_pending:enter(Scope, Key, Info, erllama_cache_save:payload(Save), Bounds) of
        ok ->
            own_entered(Alias, Key, Save, Setup);
        full ->
            ok = erllama_cache_counts:count(refused),
            answer(Alias, {error, max_concurrent});
        already_present ->
            answer(Alias, erllama_cache_background:attempt(fun() ->
                ok = erllama_cache_save:count(duplicate_dropped, Save),
                {error, already_present}
            end))
    end.

answer(Alias, Answer) ->
    Alias ! {Alias, Answer},
    ok.

own_entered(Alias, Key, Save, Setup) ->
    Owner = self(),
    Tell = fun(What) -> Owner ! {Alias, What} end,
    Attempt = fun() -> save_for_owner(Save, Setup, Tell) end,
    {Saver, Monitor} = spawn_monitor(fun() ->
        Tell({ended, erllama_cache_background:attempt(Attempt)})
    end),
    receive
        {Alias, reserved} ->
            ok = answer(Alias, {ok, Key}),
            ok = end_of(Alias, {Saver, Monitor}, Save),
            erllama_cache_pending:leave();
        {Alias, {ended, Result}} ->
            %% First: the caller may try again at once.
            ok = erllama_cache_pending:leave(),
            answer(Alias, Result);
        {'DOWN', Monitor, process, Saver, Reason} ->
            ok = erllama_cache_pending:leave(),
            answer(Alias, {error, {saver_died, Reason}})
    end.

%% The caller relies on the save.
end_of(Alias, {Saver, Monitor}, Save) ->
    receive
        {Alias, {ended, {ok, _Key}}} -> ok;
        {Alias, {ended, {error, Reason}}} -> dropped(Reason, Save);
        {Alias, {ended, {raised, _, _, _} = Raised}} -> dropped(Raised, Save);
        {'DOWN', Monitor, process, Saver, Reason} -> dropped({saver_died, Reason}, Save)
    end.

dropped(Reason, Save) ->
    ok = erllama_cache_counts:count(dropped),
    {TierSrv, Key, SaveReason} = erllama_cache_save:subject(Save),
    ?LOG_ERROR(#{
        event => save_dropped, tier_srv => TierSrv, key => erllama_cache_log:hex(Key),
        save_reason => SaveReason,
        payload_bytes => byte_size(erllama_cache_save:payload(Save)), reason => Reason
    }, ?LOG_META),
    %% The host may be what has failed.
    _ = erllama_cache_background:attempt(fun() -> erllama_cache_save:count(dropped, Save) end),
    ok.

%% The saver of a save behind its caller. A slot that is free is taken at once; otherwise it is
%% awaited when the caller has been told.
save_for_owner(Save, #{semaphore := Semaphore}, Tell) ->
    Guard = erllama_cache_nif:guard_new(Semaphore),
    Begun = erlang:monotonic_time(),
    Bytes = byte_size(erllama_cache_save:payload(Save)),
    case erllama_cache_nif:try_acquire(Guard, 1, Bytes) of
        closed ->
            closed;
        Slot ->
            try
                reserve(Save, {Slot, Guard, Bytes, Begun}, Tell)
            after
                erllama_cache_nif:release(Guard)
            end
    end.

reserve(Save, Slot, Tell) ->
    case counting_failure(fun() -> erllama_cache_save:reserve(Save) end) of
        {ok, Reserved} ->
            _ = Tell(reserved),
            finish(Reserved, Slot);
        {error, _} = Error ->
            Error
    end.

finish(Save, {Slot, Guard, Bytes, Begun}) ->
    case counting_failure(fun() -> await_slot(Slot, Guard, Bytes, Save) end) of
        ok ->
            Granted = erlang:monotonic_time(),
            {TierSrv, _Key, _Reason} = erllama_cache_save:subject(Save),
            Paced = paced(Slot, Save),
            erllama_cache_save:counted(
                fun() -> erllama_cache_save:finish(Paced, Guard, behind) end,
                {TierSrv, Bytes}, Begun, Granted
            );
        {error, _} = Error ->
            Error
    end.

%% Where saves wait for slots, the disk is behind the models already. If each rested as much as it
%% works, the pending set would fill up, and the next saves would be refused.
paced(ok, Save) -> Save;
paced(busy, Save) -> erllama_cache_save:without_rest(Save).

await_slot(ok, _Guard, _Bytes, _Save) ->
    ok;
await_slot(busy, Guard, Bytes, Save) ->
    Renew = fun() -> erllama_cache_save:renew_reservation(Save) end,
    Every = erllama_cache_host:renew_every(),
    case erllama_cache_waiter:wait_last(Guard, 1, Bytes, Every, Renew) of
        granted -> ok;
        %% The writer was stopped, and nobody else saves any more.
        closed -> ok;
        {gave_up, {lost, Error}} -> Error
    end.

%% What fails before the save has its slot counts as one in line does.
counting_failure(Fun) ->
    case erllama_cache_counts:counting_raised(Fun) of
        {error, already_present} = Error ->
            Error;
        {error, _} = Error ->
            ok = erllama_cache_counts:count(save_errors),
            Error;
        Result ->
            Result
    end.
