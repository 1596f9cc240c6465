%% A save in another process, which sends its result to the caller.
%%
%% It takes two processes. The saver saves, and may be killed. The owner answers for the save: it
%% watches the saver, tells the result to whom it concerns, does nothing else, and gives no reason
%% to be killed.
%%
%% @private
-module(erllama_cache_background).

-export([run/2, cancel/1]).
-export([for_caller/2, attempt/1]).
-export_type([raised/0]).

-type result() :: {ok, erllama_cache_writer:key()} | {error, term()}.
-type raised() :: {raised, Class :: error | exit | throw, Reason :: term(), Stack :: term()}.

%% Runs `Save' in a process of its own. The caller receives one message,
%% `{erllama_cache_writer, Ref, Result}'. Unless the save is detached, the caller's death stops it.
-spec run(fun((erllama_cache_save:stop()) -> result()), Detach :: boolean()) -> reference().
run(Save, Detach) ->
    Caller = self(),
    %% The caller waits for nothing: its next token is more urgent than this save.
    Owner = spawn(fun() -> for_caller(Caller, fun(Ref) -> own(Caller, Ref, Detach, Save) end) end),
    %% From here on a shutdown waits for it.
    ok = case Detach of
        true -> erllama_cache_pending:enter_detached(Owner);
        false -> ok
    end,
    Ref = erllama_cache_nif:handle_new(Owner),
    Owner ! {Caller, Ref},
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

%% What an owner does for its caller, when that has told it by which reference it is known.
-spec for_caller(pid(), fun((reference()) -> ok)) -> ok.
for_caller(Caller, Own) ->
    ok = erllama_cache_pending:outlive_application(),
    Monitor = monitor(process, Caller),
    receive
        {Caller, Ref} ->
            true = demonitor(Monitor, [flush]),
            Own(Ref);
        {'DOWN', Monitor, process, Caller, _} ->
            ok
    end.

own(Caller, Ref, Detach, Save) ->
    Self = self(),
    Saver = spawn_monitor(fun() -> Self ! {Ref, save_for(Caller, Ref, Detach, Save)} end),
    Caller ! {erllama_cache_writer, Ref, result_of(Saver, Ref)},
    ok.

result_of({Pid, Monitor} = Saver, Ref) ->
    receive
        {erllama_cache_writer, cancel, Ref} = Cancel ->
            Pid ! Cancel,
            result_of(Saver, Ref);
        {Ref, {raised, _, _, _} = Raised} ->
            true = demonitor(Monitor, [flush]),
            {error, Raised};
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
    attempt(fun() -> Save({Ref, Monitors}) end).

%% The result, or what was raised instead.
-spec attempt(fun(() -> Result)) -> Result | raised().
attempt(Fun) ->
    try
        Fun()
    catch
        Class:Reason:Stack -> {raised, Class, Reason, Stack}
    end.
