%% A counting semaphore as it is usually written in Erlang, to measure against: counts in a public
%% ETS table, one server for every try and every release, and waiters that sleep and ask again,
%% 5 ms first, then twice as long each time up to 50 ms, plus up to half of that at random.
-module(plain_semaphore).
-behaviour(gen_server).

-export([start_link/1, acquire/1, release/0, current/0]).
-export([init/1, handle_call/3, handle_cast/2, handle_info/2]).

-define(FIRST_SLEEP, 5).
-define(LONGEST_SLEEP, 50).

start_link(Max) ->
    gen_server:start_link({local, ?MODULE}, ?MODULE, Max, []).

acquire(Timeout) ->
    acquire(deadline(Timeout), ?FIRST_SLEEP).

acquire(Deadline, Sleep) ->
    case gen_server:call(?MODULE, try_acquire, infinity) of
        ok ->
            ok;
        busy ->
            case erlang:monotonic_time(millisecond) >= Deadline of
                true ->
                    {error, max_concurrent};
                false ->
                    timer:sleep(Sleep + rand:uniform(Sleep div 2)),
                    acquire(Deadline, min(Sleep * 2, ?LONGEST_SLEEP))
            end
    end.

%% An atom is above any number.
deadline(infinity) -> infinity;
deadline(Timeout) -> erlang:monotonic_time(millisecond) + Timeout.

release() ->
    gen_server:call(?MODULE, release, infinity).

current() ->
    ets:lookup_element(?MODULE, running, 2).

init(Max) ->
    ?MODULE = ets:new(?MODULE, [named_table, public, {read_concurrency, true}]),
    true = ets:insert(?MODULE, [{running, 0}, {max, Max}]),
    {ok, #{}}.

handle_call(try_acquire, {Pid, _}, Owners) ->
    case ets:lookup_element(?MODULE, running, 2) < ets:lookup_element(?MODULE, max, 2) of
        true ->
            _ = ets:update_counter(?MODULE, running, 1),
            {reply, ok, Owners#{Pid => monitor(process, Pid)}};
        false ->
            {reply, busy, Owners}
    end;
handle_call(release, {Pid, _}, Owners) ->
    {reply, ok, give_back(Pid, Owners)}.

handle_cast(_Request, Owners) ->
    {noreply, Owners}.

handle_info({'DOWN', _Monitor, process, Pid, _Reason}, Owners) ->
    {noreply, give_back(Pid, Owners)}.

give_back(Pid, Owners) ->
    case maps:take(Pid, Owners) of
        {Monitor, Rest} ->
            true = demonitor(Monitor, [flush]),
            _ = ets:update_counter(?MODULE, running, -1),
            Rest;
        error ->
            Owners
    end.
