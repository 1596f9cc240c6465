%% What is counted, and the text for Prometheus.
-module(erllama_cache_metrics_tests).

-include("erllama_cache_store_util.hrl").
-include_lib("eunit/include/eunit.hrl").

-import(erllama_cache_test_util, [
    temporary_dir/1, meta/1, file_of/2, page_tables_names/2, run_command/2, in_project/1, matches/2
]).
-import(erllama_cache_store_util, [running_tests/2, with_store/3]).

-define(WRITER, erllama_cache_writer).
-define(FIGURES, [saves, saved_bytes, save_errors, adoptions, replacements]).

metrics_test_() ->
    running_tests(#{slow_save_ms => 60000}, [
        fun saves_are_counted/1,
        fun a_refused_save_is_counted/1,
        fun a_save_that_raises_is_counted/1,
        fun histograms_add_up/1,
        fun text_for_prometheus/1,
        fun the_pages_metrics_are_there/1,
        fun the_dashboards_metrics_are_there/1
    ]).

save(N, Payload) ->
    ?WRITER:save(?STORE, disk, meta([N]), Payload).

added(Before) ->
    After = ?WRITER:info(),
    [maps:get(Name, After) - maps:get(Name, Before) || Name <- ?FIGURES].

saves_are_counted(Root) ->
    Before = ?WRITER:info(),
    {ok, Key} = save(1, <<"payload">>),
    ?assertEqual([1, 7, 0, 0, 0], added(Before)),
    {error, already_present} = save(1, <<"payload">>),
    ?assertEqual([1, 7, 0, 0, 0], added(Before)),
    {error, {invalid_meta, _}} = ?WRITER:save(?STORE, disk, (meta([2]))#{tokens := x}, <<>>),
    ?assertEqual([1, 7, 1, 0, 0], added(Before)),
    %% Files that the index does not know: a good one, and a damaged one.
    {ok, File} = file:read_file(file_of(Root, Key)),
    ok = erllama_cache_store:delete(?STORE, Key),
    ok = file:write_file(file_of(Root, Key), File),
    {ok, Key} = save(1, <<"other payload">>),
    ?assertEqual([2, 20, 1, 1, 0], added(Before)),
    ok = erllama_cache_store:delete(?STORE, Key),
    ok = file:write_file(file_of(Root, Key), <<"damaged">>),
    {ok, Key} = save(1, <<"payload">>),
    ?assertEqual([3, 27, 1, 1, 1], added(Before)).

%% As erllama calls it: without waiting.
a_refused_save_is_counted(_Root) ->
    #{refused := Before} = ?WRITER:info(),
    Limit = ?WRITER:max_concurrent(),
    [ok = ?WRITER:acquire(0) || _ <- lists:seq(1, Limit)],
    {error, max_concurrent} = ?WRITER:save(?STORE, disk, meta([1]), <<"payload">>, 0),
    {error, max_concurrent} = ?WRITER:acquire(0),
    {error, max_concurrent} = ?WRITER:acquire(1),
    [ok = ?WRITER:release() || _ <- lists:seq(1, Limit)],
    ?assertEqual(Before + 2, maps:get(refused, ?WRITER:info())).

a_save_that_raises_is_counted(_Root) ->
    Before = ?WRITER:info(),
    ?assertExit({noproc, _}, ?WRITER:save(no_such_store, disk, meta([1]), <<"payload">>)),
    ?assertEqual([0, 0, 1, 0, 0], added(Before)).

histograms_add_up(_Root) ->
    #{save_time := #{count := Saves0}, wait_time := #{count := Waits0}} = ?WRITER:info(),
    [{ok, _} = save(N, <<"payload">>) || N <- lists:seq(1, 5)],
    #{
        save_time := #{count := Saves, sum_us := Sum, buckets := Buckets},
        wait_time := #{count := Waits}
    } = ?WRITER:info(),
    ?assertEqual({5, 5}, {Saves - Saves0, Waits - Waits0}),
    ?assert(Sum > 0),
    ?assertMatch({infinity, Saves}, lists:last(Buckets)),
    Counts = [N || {_, N} <- Buckets],
    ?assertEqual(lists:sort(Counts), Counts).

%% Every line is a comment or `name{labels} number', every metric has its head once.
text_for_prometheus(Root) ->
    Text = with_store('a "quoted" store', #{root => Root}, fun(Store) ->
        {ok, Key} = ?WRITER:save(Store, disk, meta([1]), <<"payload">>),
        {ok, _, _} = erllama_cache_store:load(Store, Key),
        iolist_to_binary(erllama_cache_metrics:format([Store]))
    end),
    Lines = binary:split(Text, <<"\n">>, [global, trim]),
    {Comments, Samples} = lists:partition(fun(Line) -> binary:first(Line) =:= $# end, Lines),
    Sample = "^erllama_cache_[a-z_]+(\\{[a-z]+=\"([^\"\\\\]|\\\\.)*\"\\})? [0-9.]+$",
    ?assertEqual([], [Line || Line <- Samples, re:run(Line, Sample) =:= nomatch]),
    ?assertEqual(Comments, lists:uniq(Comments)),
    Has = fun(Line) -> ?assert(lists:member(Line, Lines)) end,
    Has(<<"# TYPE erllama_cache_saves_total counter">>),
    Has(<<"# TYPE erllama_cache_save_time_seconds histogram">>),
    Has(<<"erllama_cache_current 0">>),
    Has(<<"erllama_cache_store_hits_total{store=\"a \\\"quoted\\\" store\"} 1">>),
    ?assertMatch({match, _}, re:run(Text, "save_time_seconds_bucket\\{le=\"0.0025\"\\} [0-9]")),
    ?assertMatch({match, _}, re:run(Text, "save_time_seconds_bucket\\{le=\"\\+Inf\"\\} [0-9]")),
    ?assertExit({noproc, _}, erllama_cache_metrics:format([no_such_store])).

%% What the page for operators names is there.
the_pages_metrics_are_there(_Root) ->
    Text = iolist_to_binary(erllama_cache_metrics:format([?STORE])),
    Named = page_tables_names("operations.md", "metric"),
    ?assert(length(Named) >= 10),
    [
        ?assertEqual({Name, match},
                     {Name, re:run(Text, ["^# TYPE erllama_cache_", Name, " "],
                                   [multiline, {capture, none}])})
     || Name <- Named
    ].

%% What dashboard and alerts ask for, too.
the_dashboards_metrics_are_there(_Root) ->
    Text = iolist_to_binary(erllama_cache_metrics:format([?STORE])),
    [
        begin
            {ok, Json} = file:read_file(in_project(filename:join("dashboards", File))),
            Named = lists:usort([Name || [Name] <- matches("(erllama_cache_[a-z0-9_]+)", Json)]),
            ?assert(length(Named) >= Least),
            Histograms = [re:replace(Name, "_bucket$", "", [{return, binary}]) || Name <- Named],
            ?assertEqual([], [
                Name
             || Name <- Histograms,
                re:run(Text, ["^# TYPE ", Name, " "], [multiline, {capture, none}]) =:= nomatch
            ])
        end
     || {File, Least} <- [{"grafana.json", 20}, {"alerts.yml", 8}]
    ].

%% In a node of its own, whose disk fails: that is, functions that are found before the C library's.
a_failed_sync_is_counted_test_() ->
    {timeout, 60, fun a_failed_sync_is_counted/0}.

a_failed_sync_is_counted() ->
    Root = temporary_dir(?MODULE),
    {Source, Library} = {filename:join(Root, "sync.c"), filename:join(Root, "sync.so")},
    ok = file:write_file(Source, "#include <errno.h>\n"
                                 "int fdatasync(int fd) { (void)fd; errno = EIO; return -1; }\n"
                                 "int fsync(int fd) { return fdatasync(fd); }\n"),
    Preloaded = os:getenv("LD_PRELOAD", ""),
    Script = lists:concat([
        "{ok, _} = erllama_cache_store:start_link(s, #{root => \"", Root, "\"}), "
        "{ok, _} = erllama_cache_writer:start_link(#{host => erllama_cache_store}), "
        "{error, eio} = erllama_cache_writer:save(s, disk, ",
        io_lib:format("~0p", [meta([1])]), ", <<>>), "
        "#{sync_failures := 1, save_errors := 1, current := 0} = erllama_cache_writer:info(), "
        "Text = iolist_to_binary(erllama_cache_metrics:format()), "
        "{_, _} = binary:match(Text, <<\"\\nerllama_cache_sync_failures_total 1\\n\">>), "
        "halt(0)."
    ]),
    try
        ?assertEqual({0, []}, run_command("cc", ["-shared", "-fPIC", "-o", Library, Source])),
        ?assertEqual({0, []}, run_command("env", [
            lists:concat(["LD_PRELOAD=", Preloaded, ":", Library]),
            filename:join([code:root_dir(), "bin", "erl"]), "-noinput",
            "-pa", filename:join(code:lib_dir(erllama_cache_nif), "ebin"), "-eval", Script
        ])),
        ?assertEqual([], filelib:wildcard(filename:join(Root, "*.{kvc,tmp}")))
    after
        ok = file:del_dir_r(Root)
    end.
