%% What the documentation shows works: the examples of the modules' pages, the Erlang of the README
%% and of the guide from the first line to the last, and all Erlang of the other pages.
%%
%% An example that matches a pattern is checked by it. The guide's Elixir is run by
%% elixir_check.exs, the shell commands of the pages by tools/readme.sh.
-module(erllama_cache_docs_tests).

-include_lib("eunit/include/eunit.hrl").

-import(erllama_cache_test_util, [
    in_project/1, page/1, page_tables_names/2, run_command/2, source/1, matches/2, silence/0,
    unsilence/1, temporary_dir/1, stop/1
]).

-define(PUBLIC, [
    erllama_cache_writer, erllama_cache_reader, erllama_cache_store, erllama_cache_metrics,
    erllama_cache_peers
]).

%%% The modules' pages

modules_test_() ->
    [
        {lists:concat([Module, ": ", hd(string:split(Example, "\n"))]),
         {timeout, 60, fun() -> example(Example) end}}
     || Module <- ?PUBLIC, Example <- examples(source(Module))
    ].

%% Whoever adds an exported function writes an example of it.
each_function_has_an_example_test_() ->
    [
        {lists:concat([Module, ":", Function]), ?_assert(mentioned(Module, Function))}
     || Module <- ?PUBLIC, Function <- documented(Module)
    ].

%% EDoc makes a link of anything.
each_link_leads_somewhere_test_() ->
    [
        {lists:concat([Module, ": ", Link]), ?_assert(leads_somewhere(Module, Link))}
     || Module <- ?PUBLIC, Link <- links(Module)
    ].

%% What a picture says in numbers is taken from the code by nobody but whoever draws it.
the_picture_of_a_save_has_the_codes_numbers_test_() ->
    {ok, Picture} = file:read_file(in_project("docs/save.svg")),
    Core = "native/erllama_cache_core/src/files/write.rs",
    Numbers = [
        {Core, "const WRITE_PIECE: usize = ([0-9]+) \\* 1024;", "write ~ts KiB"},
        {Core, "const WRITEBACK: u64 = ([0-9]+) \\* 1024 \\* 1024;", "after each ~ts MiB"},
        {"native/erllama_cache_nif/src/slices.rs",
         "const SLICE: Duration = Duration::from_millis\\(([0-9]+)\\);", "of ~ts ms"}
    ],
    [
        {File, fun() ->
            {ok, Code} = file:read_file(in_project(File)),
            [[Number]] = matches(Pattern, Code),
            Said = unicode:characters_to_binary(io_lib:format(Text, [Number])),
            ?assertNotEqual(nomatch, binary:match(Picture, Said))
        end}
     || {File, Pattern, Text} <- Numbers
    ].

links(Module) ->
    {ok, Code} = file:read_file(source(Module)),
    lists:usort([binary_to_list(Link) || [Link] <- matches("\\{@link ([^} ]+)\\}", Code)]).

leads_somewhere(Module, Link) ->
    case string:lexemes(Link, ":/") of
        [Other] -> exports(list_to_atom(Other), module_info, "0");
        [Function, Arity] -> exports(Module, list_to_atom(Function), Arity);
        [Other, Function, Arity] -> exports(list_to_atom(Other), list_to_atom(Function), Arity)
    end.

exports(Module, Function, Arity) ->
    {module, Module} = code:ensure_loaded(Module),
    erlang:function_exported(Module, Function, list_to_integer(Arity)).

documented(Module) ->
    {ok, Code} = file:read_file(source(Module)),
    %% What is not for users says so.
    Private = [binary_to_list(Name) || [Name] <- matches(
        "^%% @private\n(?:%%.*\n|-spec(?:.|\n)*?\\.\n)*([a-z_]+)\\(", Code)],
    Callbacks = ["init", "handle_call", "handle_cast", "handle_info", "terminate"],
    Exported = [atom_to_list(Name) || {Name, _} <- Module:module_info(exports)],
    lists:usort(Exported) -- ["module_info", "test" | Callbacks ++ Private].

mentioned(Module, Function) ->
    Call = lists:concat([Module, ":", Function, "("]),
    Reference = lists:concat([Module, ":", Function, "/"]),
    Child = lists:concat(["{", Module, ", ", Function, ","]),
    lists:any(
        fun(Example) ->
            lists:any(fun(Text) -> string:find(Example, Text) =/= nomatch end,
                      [Call, Reference, Child])
        end,
        examples(source(Module))
    ).

examples(File) ->
    {ok, Code} = file:read_file(File),
    [
        unicode:characters_to_list(re:replace(Block, "^%% ?", "", [multiline, global]))
     || [Block] <- matches("^%% ```\n((?:%%.*\n)*?)%% '''", Code)
    ].

%% Each begins with nothing done but what it takes for granted: a writer and a store, unless it
%% starts them itself, and values for the variables that it does not bind.
example(Example) ->
    with_root(fun(Root) ->
        start_unless(Example, "{ok, Pid} = erllama_cache_writer:start_link", fun start_writer/0),
        start_unless(Example, "{ok, _} = erllama_cache_store:start_link", fun() ->
            start_store(Root)
        end),
        Payload = <<"the model's state">>,
        Meta = erllama_cache_test_util:meta([1, 15043, 3186]),
        Given = #{
            'Meta' => Meta, 'Payload' => Payload,
            'Fingerprint' => maps:get(fingerprint, Meta),
            'CtxParamsHash' => maps:get(ctx_params_hash, Meta)
        },
        Unbound = maps:filter(fun(Name, _) -> not binds(Example, Name) end, Given),
        evaluate(in(Root, Example), maps:merge(Unbound, stored_key(Example, Meta, Payload)))
    end).

binds(Example, Name) ->
    mentions(Example, lists:concat([Name, " = "])).

mentions(Text, Part) ->
    string:find(Text, Part) =/= nomatch.

start_unless(Example, Part, Start) ->
    mentions(Example, Part) orelse Start(),
    ok.

start_writer() ->
    {ok, _} = erllama_cache_writer:start_link(#{host => erllama_cache_store, max_concurrent => 4}).

start_store(Root) ->
    {ok, _} = erllama_cache_store:start_link(my_store, #{root => Root}).

%% What an example calls Key and does not get itself is stored.
stored_key(Example, Meta, Payload) ->
    case mentions(Example, "(my_store, Key") andalso not mentions(Example, "{ok, Key}") of
        true ->
            {ok, Key} = erllama_cache_writer:save(my_store, disk, Meta, Payload),
            #{'Key' => Key};
        false ->
            #{}
    end.

%%% The README and the guide to Erlang

-define(GUIDE, "docs/guide/erlang.md").

readme_test_() ->
    {timeout, 60, fun readme/0}.

readme() ->
    [Session, Deps] = fenced("README.md", "erlang"),
    {deps, [{erllama_cache_nif, {git, _, _}}]} = term(Deps),
    with_root(fun(Root) -> evaluate(in(Root, Session), #{}) end).

guide_test_() ->
    {timeout, 60, fun guide/0}.

guide() ->
    with_root(fun(Root) ->
        %% In the order of a reader.
        [SysConfig, Session, Prefix, AndLoad, ByHand, Async, OwnNames, WithSlot] =
            fenced(?GUIDE, "erlang"),
        [{erllama_cache_nif, Environment}] = term(in(Root, SysConfig)),
        with_environment(Environment, fun() ->
            Bound = lists:foldl(fun evaluate/2, #{}, [in(Root, Session), Prefix, AndLoad]),
            ok = application:stop(erllama_cache_nif),
            Rebound = evaluate(in(Root, ByHand), Bound),
            lists:foldl(fun evaluate/2, Rebound, [Async, OwnNames, WithSlot])
        end)
    end).

with_environment(Environment, Fun) ->
    Loaded = application:load(erllama_cache_nif),
    Before = application:get_all_env(erllama_cache_nif),
    %% That an application stops is not worth a line on the terminal.
    ok = logger:set_module_level(application_controller, warning),
    try
        [ok = application:set_env(erllama_cache_nif, Key, Value) || {Key, Value} <- Environment],
        Fun()
    after
        _ = application:stop(erllama_cache_nif),
        ok = logger:unset_module_level(application_controller),
        [ok = application:unset_env(erllama_cache_nif, Key) || {Key, _} <- Environment],
        [ok = application:set_env(erllama_cache_nif, Key, Value) || {Key, Value} <- Before],
        %% As it was found: other tests load it themselves.
        [ok = application:unload(erllama_cache_nif) || Loaded =:= ok]
    end.

%%% The page of the tests

%% Its table names the tests of each module, and they are there; and it leaves no tests out.
tests_page_test() ->
    {ok, Page} = file:read_file(in_project("test/README.md")),
    Names = fun(Pattern) ->
        lists:usort([Name || [Name] <- matches(Pattern, Page)])
    end,
    Here = fun(Wildcard) ->
        lists:sort([
            list_to_binary(filename:basename(File, ".erl"))
         || File <- filelib:wildcard(in_project(Wildcard))
        ])
    end,
    ?assertEqual(Here("src/*.erl"), Names("^\\| `(\\w+)` \\| .*(?:_tests|_SUITE)`")),
    ?assertEqual(Here("test/*_{tests,SUITE}.erl"), Names("`(\\w+_(?:tests|SUITE))`")).

%%% The other pages

pages_test_() ->
    [
        {lists:concat([Page, ": ", hd(string:split(Block, "\n"))]), fun() -> page_block(Block) end}
     || Page <- ["CONTRIBUTING.md" | pages()], Page =/= ?GUIDE, Block <- fenced(Page, "erlang")
    ].

pages() ->
    filelib:wildcard("docs/**/*.md", in_project("")).

proofs() ->
    ["proofs/README.md" | filelib:wildcard("proofs/*/README.md", in_project(""))].

%% What the table of proofs says of CI is what CI runs, both here and on GitHub.
each_proof_runs_in_ci_test_() ->
    {ok, Table} = file:read_file(in_project("proofs/README.md")),
    {ok, Ci} = file:read_file(in_project(".ci/run")),
    {ok, Nightly} = file:read_file(in_project(".github/workflows/proofs.yml")),
    Rows = matches("^\\| .* \\| `make ([a-z-]+)` \\| .* \\| (?:`(.*)`|whole) \\|$", Table),
    [
        {binary_to_list(Proof), fun() ->
            ?assert(mentions(Ci, lists:join(" ", Form ++ ["make", Proof]))),
            Job = [["form: \"", Word, "\""] || Word <- Form],
            ?assert(mentions(Nightly, ["{proof: ", lists:join(", ", [Proof | Job]), "}"]))
        end}
     || [Proof | Form] <- Rows
    ].

%% Inside erllama both are in one node, and only one module of a name is loaded.
no_module_has_a_name_of_erllamas_test() ->
    Ours = filelib:wildcard("*.erl", in_project("src")),
    Theirs = filelib:wildcard("*.erl", in_project("test/fakes")),
    ?assertEqual([], Ours -- (Ours -- Theirs)),
    ?assertMatch([_ | _], Theirs).

%% Tables of figures say what the JSON and the bounds say, which no hand copies.
tables_are_as_written_test() ->
    {Status, Output} = run_command("python3", [in_project("bench/plots.py"), "--check"]),
    ?assertEqual({0, <<>>}, {Status, iolist_to_binary(Output)}).

%% A program that measures something else than what has a bound is found here, not after minutes.
bounds_test_() ->
    {ok, Bounds} = file:consult(in_project("bench/bounds.config")),
    [
        {lists:concat([Benchmark, ": ", Id]), ?_assert(measures(program(Benchmark), Id))}
     || Bound <- Bounds, {Benchmark, Id} <- [{element(1, Bound), element(2, Bound)}]
    ].

program(save) ->
    Files = ["bench_save.erl", "bench_load.erl", "bench_costs.erl", "disk.sh"],
    [bench_source(File) || File <- Files];
program(Benchmark) ->
    [bench_source(lists:concat(["bench_", Benchmark, ".erl"]))].

bench_source(File) ->
    {ok, Source} = file:read_file(in_project("bench/" ++ File)),
    Source.

%% By its name, or by that of what is measured, on which file system, and that of a size.
measures(Program, Id) ->
    Has = fun(Pattern) -> re:run(Program, Pattern, [{capture, none}]) =:= match end,
    Has(["[{ ]", atom_to_list(Id), "[,}]"]) orelse
        case string:split(atom_to_list(Id), "_", trailing) of
            [What, Size] ->
                Has(["{'", Size, "', "]) andalso
                    (Has(["(times_floor|bound_id)\\(", What, ","]) orelse
                        Has(["for name in [a-z_ ]*\\b", What, "\\b"]));
            [_] ->
                false
        end.

%% To files of the project, pictures too, and to headings.
links_test_() ->
    [
        {lists:concat([Page, ": ", Target]), ?_assert(is_there(Page, Target))}
     || Page <- filelib:wildcard("*.md", in_project("")) ++ pages() ++ proofs() ++
                    filelib:wildcard("examples/*/*.md", in_project("")),
        Link <- targets(Page),
        Target <- [binary_to_list(Link)],
        not lists:prefix("http", Target)
    ].

%% Where a reader is sent: paths from the project, or below the core's sources.
each_file_of_where_is_what_is_there_test_() ->
    {ok, Page} = file:read_file(in_project("docs/design/overview.md")),
    [_, Table] = binary:split(Page, <<"## Where is what">>),
    Paths = lists:usort([Path || [Path] <- matches("`([^` ]+/[^` ]+\\.[a-z]+)`", Table)]),
    ?assert(length(Paths) >= 40),
    [
        {Path, ?_assert(lists:any(fun filelib:is_regular/1, [
            in_project(Path),
            filename:join(in_project("native/erllama_cache_core/src"), Path)
        ]))}
     || Path <- Paths
    ].

%% A table of a page is held to the code that it is about.
the_format_names_what_makes_a_file_corrupt_test() ->
    {ok, Code} = file:read_file(in_project("native/erllama_cache_core/src/kvc/error.rs")),
    Reasons = [Name || [Name] <- matches("=> \"([a-z_]+)\",", Code)],
    ?assertEqual(lists:sort(Reasons), lists:sort(page_tables_names("format.md", "reason"))).

the_reference_names_each_metric_test() ->
    with_root(fun(Root) ->
        start_writer(),
        start_store(Root),
        Text = iolist_to_binary(erllama_cache_metrics:format([my_store])),
        Printed = [Name || [Name] <- matches("^# TYPE erllama_cache_([a-z_]+) ", Text)],
        Named = page_tables_names("metrics.md", "metric of the writer") ++
            page_tables_names("metrics.md", "metric of a store"),
        ?assertEqual(lists:sort(Printed), lists:sort(Named))
    end).

%% Each branch of a save stands beside cases, and each of those is there and is run.
each_branch_of_a_save_has_cases_test_() ->
    {ok, Page} = file:read_file(page("erllama.md")),
    [_, After] = binary:split(Page, <<"\n## Every branch of the original's save\n">>),
    [Section | _] = binary:split(After, <<"\n## ">>),
    Rows = matches("^\\| (?!branch )([^|]+) \\| [^|]+ \\| ([^|]+) \\|$", Section),
    ?assert(length(Rows) >= 25),
    [
        {binary_to_list(Branch), fun() ->
            Named = matches("`(\\w+_SUITE):(\\w+)`", Cases),
            ?assertNotEqual([], Named),
            [?assertEqual(ok, runs(Suite, Case)) || [Suite, Case] <- Named]
        end}
     || [Branch, Cases] <- Rows
    ].

runs(Suite, Case) ->
    Name = binary_to_list(<<"test/erllama_cache_", Suite/binary, ".erl">>),
    {ok, Source} = file:read_file(in_project(Name)),
    case [matches(Pattern, Source) || Pattern <- [["^", Case, "\\("], ["^ +", Case, ",?$"]]] of
        [[_ | _], [_ | _]] -> ok;
        _ -> {not_there, Suite, Case}
    end.

targets(Page) ->
    {ok, Text} = file:read_file(in_project(Page)),
    lists:usort(lists:append(matches("\\]\\(([^) ]+)\\)", Text))).

is_there(Page, "#" ++ Heading) ->
    has_heading(Page, Heading);
is_there(Page, Target) ->
    [Path | Heading] = string:split(Target, "#"),
    File = filename:join(filename:dirname(Page), Path),
    filelib:is_file(in_project(File)) andalso
        (Heading =:= [] orelse has_heading(File, hd(Heading))).

%% As it is made into a link: in lower case, with hyphens, without punctuation.
has_heading(Page, Wanted) ->
    {ok, Text} = file:read_file(in_project(Page)),
    lists:any(
        fun([Heading]) ->
            Kept = re:replace(string:lowercase(Heading), "[^\\w -]", "", [global, unicode]),
            Name = re:replace(Kept, " ", "-", [global, unicode, {return, list}]),
            Name =:= Wanted
        end,
        matches("^#+ (.*)$", Text)
    ).

%% In a node with a writer and a store.
page_block(Block) ->
    with_root(fun(Root) ->
        start_writer(),
        start_store(Root),
        case Block of
            "1> " ++ _ -> session(Block);
            "handle(" ++ _ -> handler(Block);
            "Ours = fun" ++ _ -> logging(in(Root, Block), filename:join(Root, "cache.log"));
            "Only = fun" ++ _ -> logging(in(Root, Block), filename:join(Root, "cache.log"));
            "-module(" ++ _ -> host(in(Root, Block));
            _ -> evaluate(Block, page_bindings())
        end
    end).

%% A host: what a writer saves by it is what a store on the same root loads.
host(Block) ->
    Module = host_module(Block),
    Payload = <<"saved by another host">>,
    Meta = (erllama_cache_test_util:meta())#{quant_type := f16},
    ok = stop(erllama_cache_writer),
    {ok, _} = erllama_cache_writer:start_link(#{host => Module}),
    try
        {ok, Key} = erllama_cache_writer:save(a_name, disk, Meta, Payload),
        ?assertEqual({ok, Key}, erllama_cache_writer:save(a_name, disk, Meta, <<"again">>)),
        ?assertMatch({ok, _, Payload}, erllama_cache_store:load(my_store, Key)),
        ?assertEqual({ok, Key}, erllama_cache_store:key(Meta)),
        ?assertMatch({error, {invalid_meta, quant_type}},
                     erllama_cache_writer:save(a_name, disk, Meta#{quant_type => f32}, Payload))
    after
        true = code:delete(Module),
        _ = code:purge(Module)
    end.

host_module(Block) ->
    Forms = [begin {ok, Form} = erl_parse:parse_form(Tokens), Form end
             || Tokens <- split(tokens(Block), [])],
    {ok, Module, Code, []} = compile:forms(Forms, [return]),
    {module, Module} = code:load_binary(Module, "a page", Code),
    Module.

%% Of one event of ours and one of somebody else, one is stopped, or one goes to the file.
logging(Block, File) ->
    _ = evaluate(Block, #{}),
    case logger:get_handler_config(cache) of
        {ok, _} ->
            Level = silence(),
            ok = logger:log(warning, #{event => ours}, #{application => erllama_cache_nif}),
            ok = logger:log(warning, #{event => theirs}, #{}),
            ok = unsilence(Level),
            ok = logger_std_h:filesync(cache),
            {ok, Text} = file:read_file(File),
            ?assertMatch({_, _}, binary:match(Text, <<"ours">>)),
            ?assertEqual(nomatch, binary:match(Text, <<"theirs">>));
        {error, _} ->
            {ok, #{filters := Filters}} = logger:get_handler_config(default),
            {Filter, Argument} = proplists:get_value(cache, Filters),
            Event = fun(Meta) -> #{level => warning, msg => {report, #{}}, meta => Meta} end,
            ?assertEqual(stop, Filter(Event(#{application => erllama_cache_nif}), Argument)),
            ?assertEqual(ignore, Filter(Event(#{}), Argument))
    end.

page_bindings() ->
    #{'Node' => node(), 'Meta' => erllama_cache_test_util:meta(), 'Payload' => <<"state">>}.

%% Lines at a prompt, each followed by what the shell prints; `...' there stands for anything.
session(Block) ->
    Steps = matches("^[0-9]+> (.*)\n((?:(?![0-9]+> ).*\n)*)", Block),
    ?assertNotEqual([], Steps),
    lists:foreach(
        fun([Line, Expected]) ->
            {value, Value, _} = erl_eval:exprs(parse(tokens(Line)), erl_eval:new_bindings()),
            Printed = unicode:characters_to_list(io_lib:format("~0tp", [Value])),
            Trimmed = string:trim(Expected),
            alike(Trimmed, Printed) orelse ?assertEqual({Line, Trimmed}, {Line, Printed})
        end,
        Steps
    ).

%% A map is printed in another order by each release, and its values are this machine's: so its keys
%% have to be there. Coverage loads modules that come from no file.
alike(_Expected, "cover_compiled") ->
    true;
alike(<<"#{", _/binary>> = Expected, Printed) ->
    Names = [Name || [Name] <- matches("([a-z_]+) =>", Expected)],
    Names =/= [] andalso lists:all(fun(Name) -> mentions(Printed, [Name, " =>"]) end, Names);
alike(Expected, Printed) ->
    Quoted = re:replace(Expected, "[][()\\\\{}.*+?^$|]", "\\\\&", [global, {return, list}]),
    Pattern = string:replace(Quoted, "\\.\\.\\.", ".*", all),
    re:run(Printed, ["^", Pattern, "$"], [unicode]) =/= nomatch.

%% A clause of an HTTP handler, which is called.
handler(Block) ->
    {ok, {function, At, handle, 1, Clauses}} = erl_parse:parse_form(tokens(Block)),
    {value, Handle, _} = erl_eval:expr({'fun', At, {clauses, Clauses}}, erl_eval:new_bindings()),
    ?assertMatch({200, [{"content-type", _}], [_ | _]}, Handle(<<"/metrics">>)).

%%% Text and code

%% With a directory, and afterwards without it, the servers and what was told to the logger.
with_root(Fun) ->
    Root = temporary_dir(?MODULE),
    try
        Fun(Root)
    after
        ok = stop(my_store),
        ok = stop(erllama_cache_writer),
        _ = logger:remove_handler_filter(default, cache),
        _ = logger:remove_handler(cache),
        ok = file:del_dir_r(Root)
    end.

%% The directories that the examples name are not this machine's.
in(Root, Text) ->
    lists:foldl(
        fun(Dir, Sofar) -> lists:flatten(string:replace(Sofar, Dir, Root, all)) end,
        Text,
        ["/var/cache/kv", "/tmp/kv", "/var/log"]
    ).

%% The blocks of a page in a language, indented ones too.
fenced(Page, Language) ->
    {ok, Text} = file:read_file(in_project(Page)),
    [
        unicode:characters_to_list(Block)
     || [_Indent, Block] <- matches("^( *)```" ++ Language ++ "\n((?:.*\n)*?)\\1```$", Text)
    ].


term(Text) ->
    {ok, Term} = erl_parse:parse_term(tokens(Text)),
    Term.

%% One form after the other, as a shell does; what is bound then.
evaluate(Text, Given) ->
    Bound = lists:foldl(
        fun(Form, Bindings) ->
            {value, _, Next} = erl_eval:exprs(parse(Form), Bindings),
            Next
        end,
        maps:fold(fun erl_eval:add_binding/3, erl_eval:new_bindings(), Given),
        split(tokens(Text), [])
    ),
    maps:from_list(erl_eval:bindings(Bound)).

tokens(Text) ->
    {ok, Tokens, _} = erl_scan:string(unicode:characters_to_list(Text)),
    Tokens.

parse(Tokens) ->
    {ok, Expressions} = erl_parse:parse_exprs(Tokens),
    Expressions.

%% At each dot. The last one may be missing, as it is in `{ok, Key} = f(),'.
split([], []) -> [];
split([], Form) -> [lists:reverse([{dot, 0} | Form])];
split([{dot, _} = Dot | Rest], Form) -> [lists:reverse([Dot | Form]) | split(Rest, [])];
split([Token | Rest], Form) -> split(Rest, [Token | Form]).
