%% What a server takes over from its predecessor: its name, and a semaphore that outlives both.
%%
%% A supervisor that is killed and restarted at once may find the server of its predecessor still
%% alive for a moment. Answered `already_started', it would give up, and its own supervisor with it.
%%
%% @private
-module(erllama_cache_successor).

-export([start_link/3, inherit/2, is_stop/1]).

%% Milliseconds within which a server ends whose supervisor has ended.
-define(ENDS_WITHIN, 1000).

%% As {@link gen_server:start_link/4} for a server that traps exits, after an orphan of this name
%% has ended.
-spec start_link(atom(), module(), term()) -> {ok, pid()} | {error, term()}.
start_link(Name, Module, Args) ->
    case gen_server:start_link({local, Name}, Module, Args, []) of
        {error, {already_started, Pid}} = Error ->
            case is_orphan(Pid) andalso ends_within(Pid, ?ENDS_WITHIN) of
                true -> start_link(Name, Module, Args);
                false -> Error
            end;
        Started ->
            Started
    end.

%% Whether the process that started this one is gone. A registered name may be another process's by
%% now, but parent and child are linked while both live.
is_orphan(Pid) ->
    case process_info(Pid, [dictionary, links]) of
        undefined ->
            true;
        [{dictionary, Dictionary}, {links, Links}] ->
            case proplists:get_value('$ancestors', Dictionary, []) of
                [Parent | _] when is_atom(Parent) -> not lists:member(whereis(Parent), Links);
                [Parent | _] -> not is_process_alive(Parent);
                [] -> false
            end
    end.

ends_within(Pid, Timeout) ->
    Monitor = monitor(process, Pid),
    receive
        {'DOWN', Monitor, process, Pid, _} -> true
    after Timeout ->
        true = demonitor(Monitor, [flush]),
        false
    end.

%% The predecessor's semaphore, with the slots that are held and the waiters. A new one, made by
%% `New', where there was none, or where the library that made it has been purged.
-spec inherit(undefined | Semaphore, fun(() -> Semaphore)) -> Semaphore when
    Semaphore :: erllama_cache_nif:semaphore().
inherit(undefined, New) ->
    New();
inherit(Semaphore, New) ->
    try erllama_cache_nif:semaphore_limit(Semaphore) of
        _ -> Semaphore
    catch
        error:badarg -> New()
    end.

%% Whether a server that ends for this reason was stopped on purpose, and has no successor.
-spec is_stop(Reason :: term()) -> boolean().
is_stop(normal) -> true;
is_stop(shutdown) -> true;
is_stop({shutdown, _}) -> true;
is_stop(_) -> false.
