%% What the benchmarks share whose sides take turns on one disk.
-module(bench_turns).

-export([order/2, in_turns/1, nanoseconds/1, timed/1]).
-export([new_root/1, new_root/2, file_name/1, payload/1, mib/1, size_name/1]).

-define(MIB, 1048576).

%% Who comes first changes from round to round, and so does who comes after whom.
-spec order(Round :: pos_integer(), [Side]) -> [Side].
order(Round, Sides) ->
    Orders = permutations(Sides),
    lists:nth(Round rem length(Orders) + 1, Orders).

permutations([]) -> [[]];
permutations(List) -> [[First | Rest] || First <- List, Rest <- permutations(List -- [First])].

%% Each in a process of its own, so that what it loaded is gone before the next begins.
-spec in_turns([{Side, fun(() -> term())}]) -> [{Side, Nanoseconds :: integer()}].
in_turns(Sides) ->
    [
        begin
            {Pid, Monitor} = spawn_monitor(fun() -> exit({took, nanoseconds(Fun)}) end),
            receive {'DOWN', Monitor, process, Pid, {took, Time}} -> {Side, Time} end
        end
     || {Side, Fun} <- Sides
    ].

-spec nanoseconds(fun(() -> term())) -> integer().
nanoseconds(Fun) ->
    element(1, timed(Fun)).

-spec timed(fun(() -> Result)) -> {Nanoseconds :: integer(), Result}.
timed(Fun) ->
    Begun = erlang:monotonic_time(nanosecond),
    Result = Fun(),
    {erlang:monotonic_time(nanosecond) - Begun, Result}.

%% A new directory in that which the environment's variable names.
-spec new_root(Variable :: string(), Default :: string()) -> binary().
new_root(Variable, Default) ->
    new_root(os:getenv(Variable, Default)).

-spec new_root(Directory :: string()) -> binary().
new_root(Directory) ->
    Root = filename:join(Directory, "erllama_cache_bench." ++ os:getpid()),
    ok = filelib:ensure_dir(filename:join(Root, "x")),
    unicode:characters_to_binary(Root).

-spec file_name(Key :: binary()) -> binary().
file_name(Key) ->
    <<(string:lowercase(binary:encode_hex(Key)))/binary, ".kvc">>.

%% Random enough that nothing below can compress it.
-spec payload(Bytes :: pos_integer()) -> binary().
payload(Bytes) ->
    Chunk = rand:bytes(min(Bytes, ?MIB)),
    binary:copy(Chunk, Bytes div byte_size(Chunk)).

%% A large payload's size: see {@link bench_report:large/1}.
-spec mib(pos_integer()) -> Bytes :: pos_integer().
mib(Mib) ->
    bench_report:large(Mib) * ?MIB.

-spec size_name(Bytes :: pos_integer()) -> string().
size_name(Bytes) when Bytes >= 1024 * ?MIB -> integer_to_list(Bytes div (1024 * ?MIB)) ++ " GiB";
size_name(Bytes) when Bytes >= ?MIB -> integer_to_list(Bytes div ?MIB) ++ " MiB";
size_name(Bytes) -> integer_to_list(Bytes div 1024) ++ " KiB".
