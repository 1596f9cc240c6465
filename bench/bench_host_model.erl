%% A model's process as a host has it: it decodes tokens, which here is arithmetic that takes the
%% processor so long, streams each to its consumer, and saves its state at some of them itself.
-module(bench_host_model).

-export([calibrate/1, work/1, run/4, gaps/1, at_save/2]).
-export_type([work/0, stream/0, saved/0]).

-type work() :: pos_integer().
%% Turns of arithmetic that a token takes.
-type save() :: fun(() -> {ok, Key :: binary()} | {error, term()}).
-type saved() :: #{
    token := pos_integer(), begun := integer(), ended := integer(), flushed := integer(),
    result := {ok, Key :: binary()} | {error, term()}
}.
%% `flushed' is when the state was on the disk. All times are nanoseconds.
-type stream() :: #{stamps := [integer()], saves := [saved()]}.

%% How often the work is timed: some of these times nobody else had the processor.
-define(TIMES, 40).

%% The work that takes a processor so many nanoseconds.
-spec calibrate(pos_integer()) -> work().
calibrate(Nanoseconds) ->
    calibrate(Nanoseconds, 100000, 3).

calibrate(_Nanoseconds, Work, 0) ->
    Work;
calibrate(Nanoseconds, Work, Rounds) ->
    Shortest = lists:min([bench_turns:nanoseconds(fun() -> work(Work) end)
                          || _ <- lists:seq(1, ?TIMES)]),
    calibrate(Nanoseconds, max(1, Work * Nanoseconds div Shortest), Rounds - 1).

-spec work(work()) -> integer().
work(Turns) ->
    work(Turns, Turns).

work(0, Number) -> Number;
work(Turns, Number) -> work(Turns - 1, (Number * 1103515245 + 12345) band 16#7fffffff).

%% Has a model make so many tokens at least, with these saves after these tokens, and goes on until
%% `Flush' has returned after each of them and one more token has come.
-spec run(work(), Tokens :: pos_integer(), #{Token :: pos_integer() => save()},
          Flush :: fun(() -> ok)) -> stream().
run(Work, Tokens, Saves, Flush) ->
    Consumer = self(),
    {Model, Monitor} = spawn_monitor(fun() -> decode(1, Consumer, Work, Saves) end),
    Stream = consume(Model, Monitor, Tokens, maps:size(Saves), Flush, [], []),
    Model ! stop,
    ok = ended(Model, Monitor),
    Stream.

decode(Token, Consumer, Work, Saves) ->
    receive
        stop -> ok
    after 0 ->
        _ = work(Work),
        Consumer ! {token, self(), erlang:monotonic_time(nanosecond)},
        case Saves of
            #{Token := Save} ->
                Begun = erlang:monotonic_time(nanosecond),
                Result = Save(),
                Ended = erlang:monotonic_time(nanosecond),
                Consumer ! {saved, self(), #{
                    token => Token, begun => Begun, ended => Ended, result => Result
                }};
            #{} ->
                ok
        end,
        decode(Token + 1, Consumer, Work, Saves)
    end.

consume(Model, Monitor, Tokens, Unsaved, Flush, Stamps, Saves) ->
    receive
        {token, Model, Stamp} ->
            IsLater = lists:all(fun(#{flushed := Flushed}) -> Stamp >= Flushed end, Saves),
            case Tokens =< 1 andalso Unsaved =:= 0 andalso IsLater of
                true ->
                    #{stamps => lists:reverse(Stamps, [Stamp]), saves => lists:reverse(Saves)};
                false ->
                    consume(Model, Monitor, Tokens - 1, Unsaved, Flush, [Stamp | Stamps], Saves)
            end;
        {saved, Model, Save} ->
            Consumer = self(),
            %% Somebody else waits for it, so that tokens are taken as they come.
            _ = spawn_link(fun() ->
                ok = Flush(),
                Consumer ! {flushed, Save#{flushed => erlang:monotonic_time(nanosecond)}}
            end),
            consume(Model, Monitor, Tokens, Unsaved, Flush, Stamps, Saves);
        {flushed, Save} ->
            consume(Model, Monitor, Tokens, Unsaved - 1, Flush, Stamps, [Save | Saves]);
        {'DOWN', Monitor, process, Model, Reason} ->
            exit(Reason)
    end.

%% Without the tokens that it made in between.
ended(Model, Monitor) ->
    receive
        {token, Model, _} -> ended(Model, Monitor);
        {'DOWN', Monitor, process, Model, normal} -> ok
    end.

-spec gaps(Stamps :: [integer()]) -> [integer()].
gaps([_ | Later] = Stamps) ->
    [To - From || {From, To} <- lists:zip(lists:droplast(Stamps), Later)].

%% The gaps from the token before a save to the first one after its state was on the disk.
-spec at_save(saved(), Stamps :: [integer()]) -> [integer(), ...].
at_save(#{token := Token, flushed := Flushed}, Stamps) ->
    {Meanwhile, [After | _]} =
        lists:splitwith(fun(Stamp) -> Stamp < Flushed end, lists:nthtail(Token - 1, Stamps)),
    gaps(Meanwhile ++ [After]).
