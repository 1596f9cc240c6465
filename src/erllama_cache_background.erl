%% A save in another process, which sends its result to the caller.
%%
%% @private
-module(erllama_cache_background).

-export([run/2, cancel/1]).

%% Runs `Save' in a process of its own. The caller receives one message,
%% `{erllama_cache_writer, Ref, Result}'. Unless the save is detached, the caller's death stops it.
-spec run(fun((erllama_cache_save:stop()) -> Result), Detach :: boolean()) -> reference() when
    Result :: {ok, erllama_cache_writer:key()} | {error, term()}.
run(Save, Detach) ->
    Caller = self(),
    %% The caller waits for nothing: its next token is more urgent than this save.
    Messenger = spawn(fun() -> begin_for(Caller, Detach, Save) end),
    Ref = erllama_cache_nif:handle_new(Messenger),
    Messenger ! {Caller, Ref},
    Ref.

%% Stops the save of this reference, between two slices. Does nothing for any other reference.
-spec cancel(reference()) -> ok.
cancel(Ref) ->
    case erllama_cache_nif:handle_pid(Ref) of
        none ->
            ok;
        Pid ->
            Pid ! {erllama_cache_writer, cancel, Ref},
            ok
    end.

begin_for(Caller, Detach, Save) ->
    Monitor = monitor(process, Caller),
    receive
        {Caller, Ref} ->
            true = demonitor(Monitor, [flush]),
            Self = self(),
            Saver = spawn_monitor(fun() ->
                Self ! {Ref, save_for(Caller, Ref, Detach, Save)}
            end),
            Caller ! {erllama_cache_writer, Ref, result_of(Saver, Ref)};
        {'DOWN', Monitor, process, Caller, _} ->
            ok
    end.

%% The saver may be killed, so the result is sent by this process, which does nothing else and gives
%% no reason to be killed.
result_of({Pid, Monitor} = Saver, Ref) ->
    receive
        {erllama_cache_writer, cancel, Ref} = Cancel ->
            Pid ! Cancel,
            result_of(Saver, Ref);
        {Ref, Result} ->
            true = demonitor(Monitor, [flush]),
            Result;
        {'DOWN', Monitor, process, Pid, Reason} ->
            {error, {saver_died, Reason}}
    end.

save_for(Caller, Ref, Detach, Save) ->
    Monitors = case Detach of
        true -> [];
        false -> [monitor(process, Caller)]
    end,
    try
        Save({Ref, Monitors})
    catch
        Class:Reason:Stack -> {error, {raised, Class, Reason, Stack}}
    end.
