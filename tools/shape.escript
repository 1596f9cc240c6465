#!/usr/bin/env escript
%% Whether the code has the shape that CONTRIBUTING.md asks for:
%%
%%   - no file of the product has more than 600 lines, and no function of src/ more than 60;
%%   - no two modules of src/ call each other, directly or by way of others. Calls of a module that
%%     a variable names, as of a host's callbacks, do not count;
%%   - no line of Erlang or Rust has more than 100 columns.
%%
%%     escript tools/shape.escript [DIRECTORY]
%%
%% A line for each that is not so, and then a status of 1.
-mode(compile).

-define(FILE_LINES, 600).
-define(FUNCTION_LINES, 60).
-define(COLUMNS, 100).

main([]) ->
    main([filename:dirname(filename:dirname(filename:absname(escript:script_name())))]);
main([Project]) ->
    ok = file:set_cwd(Project),
    Erlang = files("src/*.erl"),
    Forms = [{File, Form} || File <- Erlang, Form <- forms(File)],
    Faults = lists:append([
        [too_long(File) || File <- Erlang ++ product_rust()],
        [too_long(File, Form) || {File, Form} <- Forms],
        lists:append([too_wide(File) || File <- all_erlang() ++ all_rust()]),
        circles([{module(File), Form} || {File, Form} <- Forms])
    ]),
    case lists:append(Faults) of
        [] ->
            io:format("shape: ~w files of Erlang, ~w of Rust: as it should be~n",
                      [length(all_erlang()), length(all_rust())]);
        Some ->
            [io:format(standard_error, "shape: ~ts~n", [Fault]) || Fault <- Some],
            halt(1)
    end.

files(Pattern) ->
    filelib:wildcard(Pattern).

all_erlang() ->
    files("{src,test,bench,proofs}/**/*.{erl,hrl}") ++ files("{examples,tools}/*.escript").

all_rust() ->
    files("native/*/{src,tests,fuzz_targets}/**/*.rs") ++ files("native/*/build.rs").

%% A module of tests beside what it tests is no product.
product_rust() ->
    [File || File <- files("native/*/src/**/*.rs"), filename:basename(File) =/= "tests.rs"].

module(File) ->
    list_to_atom(filename:basename(File, ".erl")).

%%% Lines

lines(File) ->
    {ok, Text} = file:read_file(File),
    string:split(unicode:characters_to_list(Text), "\n", all).

%% What follows the last newline is no line.
too_long(File) ->
    case length(lines(File)) - 1 of
        Lines when Lines > ?FILE_LINES -> [[File, fault(" has ~w lines", [Lines])]];
        _ -> []
    end.

too_long(File, {Name, _, First, Last}) when Last - First + 1 > ?FUNCTION_LINES ->
    [fault("~ts:~w: ~ts has ~w lines", [File, First, Name, Last - First + 1])];
too_long(_File, _Form) ->
    [].

too_wide(File) ->
    Lines = lines(File),
    [
        [fault("~ts:~w: ~w columns", [File, N, string:length(Line)])]
     || {N, Line} <- lists:zip(lists:seq(1, length(Lines)), Lines), string:length(Line) > ?COLUMNS
    ].

fault(Format, Arguments) ->
    io_lib:format(Format, Arguments).

%%% Functions

%% Name, tokens, first and last line of each function.
forms(File) ->
    {ok, Text} = file:read_file(File),
    {ok, Tokens, _} = erl_scan:string(unicode:characters_to_list(Text)),
    [
        {atom_to_list(Name), Form, erl_anno:line(At), erl_anno:line(element(2, lists:last(Form)))}
     || Form = [{atom, At, Name} | _] <- split(Tokens, [])
    ].

split([], Form) -> [lists:reverse(Form)];
split([{dot, _} = Dot | Rest], Form) -> [lists:reverse([Dot | Form]) | split(Rest, [])];
split([Token | Rest], Form) -> split(Rest, [Token | Form]).

%%% Circles

circles(Forms) ->
    Graph = digraph:new(),
    Modules = lists:usort([Module || {Module, _} <- Forms]),
    [digraph:add_vertex(Graph, Module) || Module <- Modules],
    [
        digraph:add_edge(Graph, From, To)
     || {From, {_, Tokens, _, _}} <- Forms, To <- called(Tokens), To =/= From,
        lists:member(To, Modules)
    ],
    [
        [fault("a circle of modules: ~ts", [lists:join(" -> ", [atom_to_list(M) || M <- Circle])])]
     || Component <- digraph_utils:cyclic_strong_components(Graph),
        Circle <- [digraph:get_short_cycle(Graph, hd(lists:sort(Component)))]
    ].

%% Funs of other modules count: a fun is made to be called.
called([{atom, _, Module}, {':', _}, {atom, _, _} | Rest]) -> [Module | called(Rest)];
called([_ | Rest]) -> called(Rest);
called([]) -> [].
