%% @doc Stores of a group, on the nodes of one cluster, lend each other their files.
%%
%% A key is a hash of what a file holds, and a file never changes. So it does not matter who has it:
%% a store that lacks a key asks the others, takes the file from one that has it, checks it to its
%% last byte, and keeps it. Stores find each other by {@link pg}; nothing is elected or replicated.
%% A peer that is slow, gone, or wrong costs a moment, and the next one is tried.
%%
%% ```
%% #{start := {erllama_cache_store, start_link, _}} =
%%     erllama_cache_store:child_spec(my_store, #{root => "/var/cache/kv", peers => my_group}).
%% '''
%%
%% A load that misses asks by itself. {@link find/2} asks for many keys at once, such as those of a
%% prompt's prefixes, and {@link fetch/2} takes a file without loading it.
-module(erllama_cache_peers).

-include("erllama_cache_store.hrl").

-export([find/2, fetch/2]).
-export([fetch_file/3]).

%% Keys of one question. A longer list would be a message of more than 128 KiB.
-define(MAX_KEYS, 4096).
%% Milliseconds for which a node is not asked for files that it could not be reached for.
-define(AVOIDED_FOR, 10000).

%% @doc Finds the first of these keys that the store has, or one of its peers: give the longest
%% prefix first. A load of it takes it from there. One question is sent to each peer, whatever the
%% number of keys.
%%
%% ```
%% {ok, Key} = erllama_cache_writer:save(my_store, disk, Meta, Payload),
%% {ok, Key, Here} = erllama_cache_peers:find(my_store, [<<1:256>>, Key]),
%% true = Here =:= node().
%% '''
%%
%% At most 4096 keys. Exits with `{noproc, _}' when the store does not run.
-spec find(erllama_cache_store:name(), [erllama_cache_writer:key()]) ->
    {ok, erllama_cache_writer:key(), node()} | miss.
find(Store, Keys) when is_atom(Store), is_list(Keys), length(Keys) =< ?MAX_KEYS ->
    #config{borrower = Borrower} = erllama_cache_index:config(Store),
    Here = [{Key, node()} || Key <- Keys, erllama_cache_peer_group:size_here(Store, Key) =/= none],
    %% Only what is better than what is here.
    Better = case Here of
        [{Best, _} | _] -> lists:takewhile(fun(Key) -> Key =/= Best end, Keys);
        [] -> Keys
    end,
    Answers = erllama_cache_peer_group:ask(Borrower, Better),
    There = [{Key, Node} || {Node, _Name, Found} <- Answers, {Key, _Size} <- Found],
    first(Keys, maps:merge(maps:from_list(There), maps:from_list(Here))).

first([Key | Keys], Found) ->
    case Found of
        #{Key := Node} -> {ok, Key, Node};
        _ -> first(Keys, Found)
    end;
first([], _Found) ->
    miss.

%% @doc Takes the file of a key from a peer that has it, whether or not the store has it already.
%% `ok' when it is in the store's root, on the disk, and checked.
%%
%% ```
%% miss = erllama_cache_peers:fetch(my_store, <<1:256>>).
%% '''
%%
%% `miss' when no peer has it, or none that has it could send it. Errors: those of a reservation in
%% this store, such as `no_room'; `{fetch_died, Reason}'; a POSIX reason of its root. Exits with
%% `{noproc, _}' when the store does not run.
-spec fetch(erllama_cache_store:name(), erllama_cache_writer:key()) ->
    ok | miss | {error, term()}.
fetch(Store, Key) when is_atom(Store), byte_size(Key) =:= 32 ->
    #config{borrower = Borrower} = erllama_cache_index:config(Store),
    fetch_file(Borrower, Key, infinity).

%% @private
%% Callers that want the same key at the same time share one fetch, by a process of its own: it goes
%% on for the others when one of them ends.
-spec fetch_file(none | #borrower{}, erllama_cache_writer:key(), timeout()) ->
    ok | miss | {error, term()}.
fetch_file(none, _Key, _Timeout) ->
    miss;
fetch_file(_Borrower, _Key, 0) ->
    %% Nobody answers in no time.
    miss;
fetch_file(Borrower, Key, Timeout) ->
    {Pid, Monitor} = spawn_monitor(fun() -> flight(Borrower, Key) end),
    case arrival(Pid, Monitor, Timeout) of
        taken -> join_flight(Borrower, Key, Timeout);
        Result -> Result
    end.

join_flight(#borrower{name = Name, flights = Flights} = Borrower, Key, Timeout) ->
    Flight = {Name, Key},
    try ets:lookup(Flights, Flight) of
        [{Flight, Pid}] ->
            case arrival(Pid, monitor(process, Pid), Timeout) of
                %% It was killed, or has just ended.
                noproc ->
                    ok = land(Flights, Flight, Pid),
                    fetch_file(Borrower, Key, Timeout);
                Result ->
                    Result
            end;
        [] ->
            fetch_file(Borrower, Key, Timeout)
    catch
        %% The table went with its store, or with its writer.
        error:badarg -> exit({noproc, {?MODULE, Name}})
    end.

arrival(Pid, Monitor, Timeout) ->
    receive
        {'DOWN', Monitor, process, Pid, {shutdown, {arrived, Result}}} -> Result;
        {'DOWN', Monitor, process, Pid, noproc} -> noproc;
        {'DOWN', Monitor, process, Pid, killed} -> miss;
        %% The host has raised.
        {'DOWN', Monitor, process, Pid, Reason} -> {error, {fetch_died, Reason}}
    after Timeout ->
        true = demonitor(Monitor, [flush]),
        {error, timeout}
    end.

%% Its result is the reason of its end, which whoever waits for it gets.
-dialyzer({no_return, [flight/2, fetch_file/3]}).
-spec flight(#borrower{}, erllama_cache_nif:key()) -> no_return().
flight(#borrower{name = Name, flights = Flights} = Borrower, Key) ->
    Flight = {Name, Key},
    Result = try ets:insert_new(Flights, {Flight, self()}) of
        true ->
            Holders = erllama_cache_peer_group:ask(Borrower, [Key]),
            Fetched = from_first(Borrower, Key, Holders),
            ok = land(Flights, Flight, self()),
            Fetched;
        false ->
            taken
    catch
        error:badarg -> miss
    end,
    exit({shutdown, {arrived, Result}}).

land(Flights, Flight, Pid) ->
    try ets:delete_object(Flights, {Flight, Pid}) of
        true -> ok
    catch
        %% The table went, see above.
        error:badarg -> ok
    end.

%% The first that sends it.
from_first(_Borrower, _Key, []) ->
    miss;
from_first(Borrower, Key, [{Node, Name, [{Key, _Size}]} | Others]) ->
    case is_reachable(Borrower, Node) andalso borrowed(Borrower, Key, Node, Name) of
        false ->
            from_first(Borrower, Key, Others);
        {ok, Size} ->
            count(Borrower, {fetched, Size});
        already_present ->
            ok;
        %% The next one may be better.
        {failed, busy} ->
            from_first(Borrower, Key, Others);
        {failed, Reason} ->
            ok = failed(Borrower, Key, Node, Reason),
            from_first(Borrower, Key, Others);
        {unreachable, Reason} ->
            ok = failed(Borrower, Key, Node, Reason),
            ok = avoid(Borrower, Node),
            from_first(Borrower, Key, Others);
        %% Nobody else's file would do better here.
        {error, _} = Error ->
            Error
    end;
%% What no store answers.
from_first(Borrower, Key, [_ | Others]) ->
    from_first(Borrower, Key, Others).

failed(Borrower, Key, Node, Reason) ->
    ok = count(Borrower, fetch_failed),
    erllama_cache_store_log:fetch_failed(Borrower, Key, Node, Reason).

borrowed(#borrower{name = Here} = Borrower, Key, Node, Name) ->
    Borrow = fun() -> erllama_cache_borrow:run(Borrower, Key, {Node, Name}) end,
    erllama_cache_telemetry:span(fetch, #{name => Here, key => Key, peer => Node}, {Borrow, fun
        ({ok, Size}) -> {#{bytes => Size}, #{result => ok}};
        ({_Whose, Reason}) -> {#{}, #{result => Reason}};
        (already_present) -> {#{}, #{result => already_present}}
    end}).

count(#borrower{host = Host, name = Name}, Event) ->
    Host:count(Name, Event).

%% A node behind a firewall costs its time once in a while, not at each load.
avoid(#borrower{flights = Flights}, Node) ->
    true = ets:insert(Flights, {{avoided, Node}, now_ms() + ?AVOIDED_FOR}),
    ok.

is_reachable(#borrower{flights = Flights}, Node) ->
    case ets:lookup(Flights, {avoided, Node}) of
        [{_, Until}] -> now_ms() >= Until;
        [] -> true
    end.

now_ms() ->
    erlang:monotonic_time(millisecond).
