%% What the state machines of PropEr share: how many sequences run, what a failure prints, steps,
%% and the comparison of a picture of the model with what is there.
-module(erllama_cache_statem_util).

-include_lib("proper/include/proper.hrl").

-export([machine_test/5, property/2, property/3, step/1, matches/3]).

-import(erllama_cache_test_util, [eventually/2]).

%% An EUnit test of so many sequences, PROPER_SEQUENCES= if that is set, each of which may take
%% `Ms' on a busy machine, with a minute or two for the rest.
-spec machine_test({fun(() -> State), fun((State) -> term())}, proper:outer_test(),
                   pos_integer(), pos_integer(), [proper:user_opt()]) -> tuple().
machine_test({Setup, Teardown}, Property, Default, Ms, Options) ->
    Sequences = list_to_integer(os:getenv("PROPER_SEQUENCES", integer_to_list(Default))),
    Seconds = 120 + Sequences * Ms div 1000,
    Check = fun() -> check(Property, [quiet, {numtests, Sequences}, {to_file, user} | Options]) end,
    {setup, Setup, Teardown, {timeout, Seconds, Check}}.

check(Property, Options) ->
    case proper:quickcheck(Property, Options) of
        true ->
            ok;
        false ->
            Commands = lists:last(proper:counterexample()),
            error({counterexample, [Call || {set, _, Call} <- Commands]});
        {error, Reason} ->
            error(Reason)
    end.

%% `Run' runs a sequence of a module's commands and returns `passed' or what was wrong.
-spec property(module(), fun((list()) -> term())) -> proper:outer_test().
property(Module, Run) ->
    ?FORALL(Commands, proper_statem:commands(Module), passes(Run, Commands)).

%% The same, from each of these states, which stands before the commands.
-spec property(module(), [State :: term(), ...], fun((list()) -> term())) -> proper:outer_test().
property(Module, States, Run) ->
    ?FORALL(State, oneof(States),
            ?FORALL(Commands, proper_statem:commands(Module, State), passes(Run, Commands))).

passes(Run, Commands) ->
    Outcome = step(fun() -> Run(Commands) end),
    ?WHENFAIL(
        io:format(user, "~n~p~nmismatch: ~p~n", [Outcome, get(mismatch)]),
        Outcome =:= passed
    ).

%% What a step raises is its outcome. PropEr's own way to report it asks for the stack trace as
%% Erlang no longer gives it, and hides it.
-spec step(fun(() -> Outcome)) -> Outcome | noproc | {raised, atom(), term(), list()}.
step(Step) ->
    try
        Step()
    catch
        exit:{noproc, _} -> noproc;
        Class:Reason:Stack -> {raised, Class, Reason, Stack}
    end.

%% Whether `See' returns what is wanted within so many milliseconds. If it does not, the difference
%% is kept for property/2 to print.
-spec matches(term(), fun(() -> term()), non_neg_integer()) -> boolean().
matches(Wanted, See, Deadline) ->
    Matches = fun() ->
        Seen = See(),
        _ = put(mismatch, {{wanted, Wanted}, {seen, Seen}}),
        Seen =:= Wanted
    end,
    try eventually(Matches, Deadline) of
        ok ->
            _ = erase(mismatch),
            true
    catch
        error:_ -> false
    end.
