%% Figures: percentiles, a table that says which targets are met, and JSON.
-module(bench_report).

-export([summary/1, median/1, target/4, print/2, write_json/3, exit_code/1, machine/0]).
-export_type([summary/0, target/0]).

-type summary() :: #{p50 := number(), p99 := number(), max := number(), n := pos_integer()}.
-type target() :: #{name := string(), value := number(), bound := number(), unit := string(),
                    met := boolean()}.

-spec summary([number(), ...]) -> summary().
summary(Samples) ->
    Sorted = list_to_tuple(lists:sort(Samples)),
    N = tuple_size(Sorted),
    At = fun(Percent) -> element(max(1, (N * Percent + 99) div 100), Sorted) end,
    #{p50 => At(50), p99 => At(99), max => element(N, Sorted), n => N}.

-spec median([number(), ...]) -> number().
median(Samples) ->
    maps:get(p50, summary(Samples)).

%% A line of the table: what was measured may be at most, or has to be at least, the bound.
-spec target(string(), number(), {at_most | at_least, number()}, string()) -> target().
target(Name, Value, {at_most, Bound}, Unit) ->
    #{name => Name, value => Value, bound => Bound, unit => Unit, met => Value =< Bound,
      relation => at_most};
target(Name, Value, {at_least, Bound}, Unit) ->
    #{name => Name, value => Value, bound => Bound, unit => Unit, met => Value >= Bound,
      relation => at_least}.

-spec print(string(), [target()]) -> ok.
print(Title, Targets) ->
    io:format("~n~ts~n~ts~n", [Title, lists:duplicate(length(Title), $-)]),
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
-spec machine() -> map().
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
-spec write_json(string(), [target()], map()) -> ok.
write_json(Name, Targets, Figures) ->
    File = filename:join(["bench", "results", Name ++ ".json"]),
    ok = filelib:ensure_dir(File),
    Report = #{
        machine => machine(), judged => is_judged(), targets => Targets, figures => Figures
    },
    ok = file:write_file(File, [json(Report), $\n]),
    io:format("~n  ~ts~n", [File]).

%% What the program ends with: 1 when a bound is missed. With BENCH_JUDGE=no it has run, and that is
%% all that counts: on a machine that is not at rest the figures mean nothing.
-spec exit_code([target()]) -> 0 | 1.
exit_code(Targets) ->
    case [Name || #{name := Name, met := false} <- Targets] of
        [_ | _] ->
            case is_judged() of true -> 1; false -> 0 end;
        [] ->
            0
    end.

is_judged() ->
    os:getenv("BENCH_JUDGE") =/= "no".

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
