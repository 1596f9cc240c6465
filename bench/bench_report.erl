%% Figures: percentiles, a table that says which bounds are met, and JSON.
-module(bench_report).

-export([main/2, large/1, rounds/1, summary/1, median/1]).
-export_type([summary/0, values/0]).

-type summary() :: #{p50 := number(), p99 := number(), max := number(), n := pos_integer()}.
%% By the identifiers of bounds.config.
-type values() :: [{atom(), number()}].
-type target() :: #{id := atom(), name := string(), value := number(), bound := number(),
                    unit := string(), relation := at_most | at_least, met := boolean()}.

%% Runs a benchmark, says which bounds are met, writes all of it down and ends the VM: with 1 when a
%% bound is missed, with 2 when the benchmark fails.
%%
%% In a process of its own, for `erl -s' runs this in one whose heap is not like a worker's.
-spec main(atom(), fun(() -> {values(), Figures :: map()})) -> no_return().
main(Benchmark, Measure) ->
    ok = io:setopts([{encoding, unicode}]),
    is_quick() andalso io:format("Quick: large sizes and counts are a sixteenth of those said.~n"),
    {_, Monitor} = spawn_monitor(fun() -> exit(judge(Benchmark, Measure())) end),
    receive
        {'DOWN', Monitor, process, _, Code} when is_integer(Code) -> halt(Code);
        {'DOWN', Monitor, process, _, Reason} -> io:format("~p~n", [Reason]), halt(2)
    end.

judge(Benchmark, {Values, Figures}) ->
    {ok, Bounds} = file:consult(filename:join("bench", "bounds.config")),
    Targets = [target(Benchmark, Id, Value, Bounds) || {Id, Value} <- Values],
    print(Targets),
    write_json(atom_to_list(Benchmark), Targets, Figures),
    exit_code(Targets).

%% How many there are of what there are many of, or of what is large: with BENCH_QUICK=yes a
%% sixteenth, which shows that it runs, and nothing else.
-spec large(pos_integer()) -> pos_integer().
large(Count) ->
    case is_quick() of
        true -> max(1, Count div 16);
        false -> Count
    end.

%% How often something is measured: with BENCH_QUICK=yes twice, or once where it is once.
-spec rounds(pos_integer()) -> pos_integer().
rounds(Rounds) ->
    case is_quick() of
        true -> min(2, Rounds);
        false -> Rounds
    end.

is_quick() ->
    os:getenv("BENCH_QUICK") =:= "yes".

-spec summary([number(), ...]) -> summary().
summary(Samples) ->
    Sorted = list_to_tuple(lists:sort(Samples)),
    N = tuple_size(Sorted),
    At = fun(Percent) -> element(max(1, (N * Percent + 99) div 100), Sorted) end,
    #{p50 => At(50), p99 => At(99), max => element(N, Sorted), n => N}.

-spec median([number(), ...]) -> number().
median(Samples) ->
    maps:get(p50, summary(Samples)).

-spec target(atom(), atom(), number(), [tuple()]) -> target().
target(Benchmark, Id, Value, Bounds) ->
    [Row] = [Each || Each <- Bounds, element(1, Each) =:= Benchmark, element(2, Each) =:= Id],
    {Name, Relation, Bound, Unit} = case Row of
        {_, _, N, R, B, U} -> {N, R, B, U};
        {_, _, N, R, _OfMedian, U, EachRun} -> {N, R, EachRun, U}
    end,
    Met = case Relation of at_most -> Value =< Bound; at_least -> Value >= Bound end,
    #{id => Id, name => Name, value => Value, bound => Bound, unit => Unit, relation => Relation,
      met => Met}.

print([]) ->
    %% It compares, and judges nothing.
    ok;
print(Targets) ->
    io:format("~n"),
    Width = lists:max([string:length(Name) || #{name := Name} <- Targets]),
    lists:foreach(fun(Target) -> print_target(Target, Width) end, Targets).

print_target(#{name := Name, value := Value, bound := Bound, unit := Unit, met := Met,
               relation := Relation}, Width) ->
    Sign = case Relation of at_most -> "=<"; at_least -> ">=" end,
    Verdict = case Met of true -> "met"; false -> "MISSED" end,
    io:format("  ~ts  ~10ts ~ts ~-8ts ~-5ts ~ts~n", [
        string:pad(Name, Width), number(Value), Sign, number(Bound), Unit, Verdict
    ]).

number(Value) when is_integer(Value) -> integer_to_list(Value);
number(Value) when Value >= 100 -> float_to_list(Value, [{decimals, 0}]);
number(Value) -> float_to_list(Value, [{decimals, 2}]).

%% What the figures were measured on.
machine() ->
    #{
        otp => erlang:system_info(otp_release),
        erts => erlang:system_info(version),
        schedulers => erlang:system_info(schedulers_online),
        system => string:trim(os:cmd("uname -srm")),
        processor => string:trim(
            os:cmd("sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1")
        )
    }.

%% Into `bench/results/Name.json', beside the run's figures and targets what it ran on.
write_json(Name, Targets, Figures) ->
    File = filename:join(["bench", "results", Name ++ ".json"]),
    ok = filelib:ensure_dir(File),
    Report = #{
        machine => machine(), judged => is_judged(), targets => Targets, figures => Figures
    },
    ok = file:write_file(File, [json(Report), $\n]),
    io:format("~n  ~ts~n", [File]).

%% With BENCH_JUDGE=no it has run, and that is all that counts: on a machine that is not at rest the
%% figures mean nothing. Nor do those of a quick run.
exit_code(Targets) ->
    case [Name || #{name := Name, met := false} <- Targets] of
        [_ | _] ->
            case is_judged() of true -> 1; false -> 0 end;
        [] ->
            0
    end.

is_judged() ->
    os:getenv("BENCH_JUDGE") =/= "no" andalso not is_quick().

json(Map) when is_map(Map) ->
    Pairs = [[json(name(Key)), $:, json(Value)] || {Key, Value} <- lists:sort(maps:to_list(Map))],
    [${, lists:join($,, Pairs), $}];
json(true) -> "true";
json(false) -> "false";
json(Atom) when is_atom(Atom) -> json(atom_to_list(Atom));
json(Integer) when is_integer(Integer) -> integer_to_list(Integer);
json(Float) when is_float(Float) -> float_to_list(Float, [{decimals, 4}, compact]);
json([]) -> "[]";
json(List) when is_list(List) ->
    case io_lib:printable_unicode_list(List) of
        true -> [$", lists:map(fun escape/1, List), $"];
        false -> [$[, lists:join($,, lists:map(fun json/1, List)), $]]
    end;
json(Binary) when is_binary(Binary) -> json(unicode:characters_to_list(Binary)).

name(Key) when is_atom(Key) -> atom_to_list(Key);
name(Key) when is_integer(Key) -> integer_to_list(Key);
name({Key, Of}) -> name(Key) ++ "_" ++ name(Of);
name(Key) -> Key.

escape($") -> "\\\"";
escape($\\) -> "\\\\";
escape($\n) -> "\\n";
escape(Char) -> unicode:characters_to_binary([Char]).
