%% What operators see: counters, the text for Prometheus, events in the log, words for errors.
-module(erllama_cache_metrics_tests).

-include_lib("eunit/include/eunit.hrl").

-export([log/2]).

-define(WRITER, erllama_cache_writer).
-define(STORE, 'metrics "store"').

metrics_test_() ->
    {foreach, fun setup/0, fun teardown/1, [
        fun(Root) -> {atom_to_list(Name), {timeout, 60, fun() -> Test(Root) end}} end
     || {Name, Test} <- [
        {saves_are_counted, fun saves_are_counted/1},
        {a_refused_save_is_counted, fun a_refused_save_is_counted/1},
        {a_save_that_raises_is_counted, fun a_save_that_raises_is_counted/1},
        {histograms_add_up, fun histograms_add_up/1},
        {text_for_prometheus, fun text_for_prometheus/1},
        {a_slow_save_is_logged, fun a_slow_save_is_logged/1},
        {a_start_is_logged, fun a_start_is_logged/1},
        {a_root_that_needs_names_is_logged, fun a_root_that_needs_names_is_logged/1},
        {what_a_start_finds_is_logged, fun what_a_start_finds_is_logged/1},
        {a_root_that_is_another_is_logged, fun a_root_that_is_another_is_logged/1},
        {an_eviction_that_fails_is_logged, fun an_eviction_that_fails_is_logged/1},
        {a_save_that_goes_well_logs_nothing, fun a_save_that_goes_well_logs_nothing/1},
        {the_pages_metrics_are_there, fun the_pages_metrics_are_there/1}
     ]
    ]}.

setup() ->
    Root = filename:join("/tmp", "erllama_cache_metrics." ++ os:getpid()),
    ok = filelib:ensure_dir(filename:join(Root, "x")),
    {ok, _} = erllama_cache_store:start_link(?STORE, #{root => Root}),
    {ok, _} = ?WRITER:start_link(#{host => erllama_cache_store, slow_save_ms => 60000}),
    Root.

teardown(Root) ->
    lists:foreach(fun stop/1, [?WRITER, ?STORE]),
    ok = file:del_dir_r(Root).

%% One that a test has started anew ends with the test's process, before this or meanwhile.
stop(Name) ->
    try
        gen_server:stop(Name)
    catch
        exit:noproc -> ok;
        exit:{_, {sys, terminate, _}} -> ok
    end.

meta(N) ->
    #{
        save_reason => cold, quant_bits => 16, quant_type => f16, fingerprint => <<N:256>>,
        fingerprint_mode => safe, ctx_params_hash => <<2:256>>, tokens => [1, 2, N],
        context_size => 4096
    }.

save(N, Payload) ->
    ?WRITER:save(?STORE, disk, meta(N), Payload).

path(Root, Key) ->
    binary_to_list(iolist_to_binary([Root, "/", string:lowercase(binary:encode_hex(Key)), ".kvc"])).

-define(FIGURES, [saves, saved_bytes, save_errors, adoptions, replacements]).

added(Before) ->
    After = ?WRITER:info(),
    [maps:get(Name, After) - maps:get(Name, Before) || Name <- ?FIGURES].

saves_are_counted(Root) ->
    Before = ?WRITER:info(),
    {ok, Key} = save(1, <<"payload">>),
    ?assertEqual([1, 7, 0, 0, 0], added(Before)),
    {error, already_present} = save(1, <<"payload">>),
    ?assertEqual([1, 7, 0, 0, 0], added(Before)),
    {error, {invalid_meta, _}} = ?WRITER:save(?STORE, disk, (meta(2))#{tokens := x}, <<>>),
    ?assertEqual([1, 7, 1, 0, 0], added(Before)),
    %% Files that the index does not know: a good one, and a damaged one.
    {ok, File} = file:read_file(path(Root, Key)),
    ok = erllama_cache_store:delete(?STORE, Key),
    ok = file:write_file(path(Root, Key), File),
    {ok, Key} = save(1, <<"other payload">>),
    ?assertEqual([2, 20, 1, 1, 0], added(Before)),
    ok = erllama_cache_store:delete(?STORE, Key),
    ok = file:write_file(path(Root, Key), <<"damaged">>),
    {ok, Key} = save(1, <<"payload">>),
    ?assertEqual([3, 27, 1, 1, 1], added(Before)).

%% As erllama calls it: without waiting.
a_refused_save_is_counted(_Root) ->
    #{refused := Before} = ?WRITER:info(),
    Limit = ?WRITER:max_concurrent(),
    [ok = ?WRITER:acquire(0) || _ <- lists:seq(1, Limit)],
    {error, max_concurrent} = ?WRITER:save(?STORE, disk, meta(1), <<"payload">>, 0),
    {error, max_concurrent} = ?WRITER:acquire(0),
    {error, max_concurrent} = ?WRITER:acquire(1),
    [ok = ?WRITER:release() || _ <- lists:seq(1, Limit)],
    ?assertEqual(Before + 2, maps:get(refused, ?WRITER:info())).

a_save_that_raises_is_counted(_Root) ->
    Before = ?WRITER:info(),
    ?assertExit({noproc, _}, ?WRITER:save(no_such_store, disk, meta(1), <<"payload">>)),
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
text_for_prometheus(_Root) ->
    {ok, Key} = save(1, <<"payload">>),
    {ok, _, _} = erllama_cache_store:load(?STORE, Key),
    Text = iolist_to_binary(erllama_cache_metrics:format([?STORE])),
    Lines = binary:split(Text, <<"\n">>, [global, trim]),
    {Comments, Samples} = lists:partition(fun(Line) -> binary:first(Line) =:= $# end, Lines),
    Sample = "^erllama_cache_[a-z_]+(\\{[a-z]+=\"([^\"\\\\]|\\\\.)*\"\\})? [0-9.]+$",
    ?assertEqual([], [Line || Line <- Samples, re:run(Line, Sample) =:= nomatch]),
    ?assertEqual(Comments, lists:uniq(Comments)),
    Has = fun(Line) -> ?assert(lists:member(Line, Lines)) end,
    Has(<<"# TYPE erllama_cache_saves_total counter">>),
    Has(<<"# TYPE erllama_cache_save_time_seconds histogram">>),
    Has(<<"erllama_cache_current 0">>),
    Has(<<"erllama_cache_store_hits_total{store=\"metrics \\\"store\\\"\"} 1">>),
    ?assertMatch({match, _}, re:run(Text, "save_time_seconds_bucket\\{le=\"0.0025\"\\} [0-9]")),
    ?assertMatch({match, _}, re:run(Text, "save_time_seconds_bucket\\{le=\"\\+Inf\"\\} [0-9]")),
    ?assertExit({noproc, _}, erllama_cache_metrics:format([no_such_store])).

a_slow_save_is_logged(Root) ->
    ok = gen_server:stop(?WRITER),
    {ok, _} = ?WRITER:start_link(#{host => erllama_cache_store, slow_save_ms => 1}),
    Key = with_log(fun() ->
        {ok, Saved} = save(1, binary:copy(<<7>>, 64 bsl 20)),
        Saved
    end),
    #{save_ms := Took} = logged(slow_save, warning, fun(Event) ->
        ?assertMatch(
            #{tier_srv := ?STORE, key := Key, payload_bytes := 67108864, waited_ms := _}, Event
        )
    end),
    ?assert(Took >= 1),
    ?assert(filelib:is_regular(path(Root, Key))).

a_start_is_logged(Root) ->
    {ok, Key} = save(1, <<"payload">>),
    Size = filelib:file_size(path(Root, Key)),
    restart_logged(#{root => Root}),
    logged(store_scanned, info, fun(Event) ->
        ?assertMatch(#{store := ?STORE, root := Root, files := 1, bytes := Size, ms := _}, Event)
    end).

%% The system's own file systems have no files without a name.
a_root_that_needs_names_is_logged(_Root) ->
    Root = "/proc/self/task",
    case filelib:is_dir(Root) of
        true ->
            restart_logged(#{root => Root}),
            logged(root_needs_names, notice, fun(Event) ->
                ?assertMatch(#{store := ?STORE, root := Root}, Event)
            end);
        false ->
            ok
    end.

what_a_start_finds_is_logged(Root) ->
    {ok, Key} = save(1, <<"payload">>),
    {ok, File} = file:read_file(path(Root, Key)),
    {Damaged, Later} = {path(Root, <<1:256>>), path(Root, <<2:256>>)},
    ok = file:write_file(Damaged, <<"damaged">>),
    ok = file:change_time(Damaged, {{2020, 1, 1}, {0, 0, 0}}),
    <<Magic:3/binary, 1, Rest/binary>> = File,
    ok = file:write_file(Later, [Magic, 2, Rest]),
    restart_logged(#{root => Root}),
    logged(corrupt_file_removed, warning, fun(Event) ->
        ?assertMatch(#{store := ?STORE, file := Damaged, reason := truncated}, Event)
    end),
    logged(file_skipped, warning, fun(Event) ->
        ?assertMatch(#{store := ?STORE, file := Later, reason := {corrupt, unsupported_version}},
                     Event)
    end),
    ?assertEqual({false, true}, {filelib:is_file(Damaged), filelib:is_file(Later)}).

%% And what is in it is found, with what was in the other one forgotten.
a_root_that_is_another_is_logged(Root) ->
    ok = gen_server:stop(?STORE),
    Place = filename:join(Root, "place"),
    ok = file:make_dir(Place),
    with_log(fun() ->
        {ok, _} = erllama_cache_store:start_link(?STORE, #{root => Place, max_bytes => 1 bsl 20}),
        {ok, Gone} = save(1, <<"gone">>),
        ok = file:rename(Place, filename:join(Root, "moved")),
        ok = file:make_dir(Place),
        {ok, Theirs} = file:read_file(path(filename:join(Root, "moved"), Gone)),
        ok = file:write_file(path(Place, <<1:256>>), Theirs),
        miss = erllama_cache_store:load(?STORE, Gone),
        #{used := Used, should := Used} = gen_server:call(?STORE, audit),
        Size = byte_size(Theirs),
        ?assertMatch(#{files := 1, bytes := Size}, erllama_cache_store:info(?STORE)),
        ?assertEqual(Size, Used),
        {ok, _} = save(1, <<"again">>)
    end),
    logged(root_changed, warning, fun(Event) ->
        ?assertMatch(#{store := ?STORE, root := Place}, Event)
    end).

an_eviction_that_fails_is_logged(Root) ->
    Payload = binary:copy(<<7>>, 4096),
    {ok, Key} = save(1, Payload),
    Path = path(Root, Key),
    restart_logged(#{root => Root, max_bytes => filelib:file_size(Path) + 1000}),
    ok = file:delete(Path),
    ok = file:make_dir(Path),
    with_log(fun() -> {error, no_room} = save(2, Payload) end),
    logged(file_skipped, warning, fun(Event) ->
        ?assertMatch(#{store := ?STORE, file := Path, reason := _}, Event)
    end).

a_save_that_goes_well_logs_nothing(_Root) ->
    with_log(fun() ->
        {ok, Key} = save(1, <<"payload">>),
        {ok, _, _} = erllama_cache_store:load(?STORE, Key),
        {error, already_present} = save(1, <<"payload">>),
        ok = erllama_cache_store:delete(?STORE, Key)
    end),
    nothing_logged().

restart_logged(Options) ->
    ok = gen_server:stop(?STORE),
    with_log(fun() -> {ok, _} = erllama_cache_store:start_link(?STORE, Options) end).

%% What the page for operators names is what there is: metrics here, events of the log below.
the_pages_metrics_are_there(_Root) ->
    Text = iolist_to_binary(erllama_cache_metrics:format([?STORE])),
    Named = lists:append([in_backticks(Cell) || Cell <- first_cells("metric")]),
    ?assert(length(Named) >= 10),
    [
        ?assertEqual({Name, match},
                     {Name, re:run(Text, ["^# TYPE erllama_cache_", Name, " "],
                                   [multiline, {capture, none}])})
     || Name <- Named
    ].

the_pages_events_are_there_test() ->
    Named = lists:append([in_backticks(Cell) || Cell <- first_cells("`event`")]),
    Sources = filelib:wildcard(filename:join(filename:dirname(source()), "*.erl")),
    Logged = [Event || Source <- Sources, Event <- events(Source)],
    ?assertEqual(lists:usort(Logged), lists:sort(Named)).

events(Source) ->
    {ok, Code} = file:read_file(Source),
    [Event || [Event] <- matches("event => ([a-z_]+)", Code)].

%% The first cells of a table of docs/operations.md, chosen by how its head begins.
first_cells(Head) ->
    Page = filename:join([filename:dirname(source()), "..", "docs", "operations.md"]),
    {ok, Text} = file:read_file(Page),
    [Rows] = lists:append(matches(["^\\| ", Head, ".*\n\\|[-|]+\n((?:\\|.*\n)+)"], Text)),
    [Cell || [Cell] <- matches("^\\| (.*?) \\|", Rows)].

in_backticks(Cell) ->
    [Name || [Name] <- matches("`([a-z_]+)`", Cell)].

matches(Pattern, Text) ->
    case re:run(Text, Pattern, [global, multiline, {capture, all_but_first, binary}]) of
        {match, Matches} -> Matches;
        nomatch -> []
    end.

source() ->
    proplists:get_value(source, ?WRITER:module_info(compile)).

%% In a node of its own, whose disk fails: that is, functions that are found before the C library's.
a_failed_sync_is_counted_test_() ->
    {timeout, 60, fun a_failed_sync_is_counted/0}.

a_failed_sync_is_counted() ->
    Root = filename:join("/tmp", "erllama_cache_sync." ++ os:getpid()),
    ok = file:make_dir(Root),
    {Source, Library} = {filename:join(Root, "sync.c"), filename:join(Root, "sync.so")},
    ok = file:write_file(Source, "#include <errno.h>\n"
                                 "int fdatasync(int fd) { (void)fd; errno = EIO; return -1; }\n"
                                 "int fsync(int fd) { return fdatasync(fd); }\n"),
    Run = fun erllama_cache_test_util:run_command/2,
    Preloaded = os:getenv("LD_PRELOAD", ""),
    Script = lists:concat([
        "{ok, _} = erllama_cache_store:start_link(s, #{root => \"", Root, "\"}), "
        "{ok, _} = erllama_cache_writer:start_link(#{host => erllama_cache_store}), "
        "{error, eio} = erllama_cache_writer:save(s, disk, ",
        io_lib:format("~0p", [meta(1)]), ", <<>>), "
        "#{sync_failures := 1, save_errors := 1, current := 0} = erllama_cache_writer:info(), "
        "Text = iolist_to_binary(erllama_cache_metrics:format()), "
        "{_, _} = binary:match(Text, <<\"\\nerllama_cache_sync_failures_total 1\\n\">>), "
        "halt(0)."
    ]),
    try
        ?assertEqual({0, []}, Run("cc", ["-shared", "-fPIC", "-o", Library, Source])),
        ?assertEqual({0, []}, Run("env", [
            lists:concat(["LD_PRELOAD=", Preloaded, ":", Library]),
            filename:join([code:root_dir(), "bin", "erl"]), "-noinput",
            "-pa", filename:join(code:lib_dir(erllama_cache_nif), "ebin"), "-eval", Script
        ])),
        ?assertEqual([], filelib:wildcard(filename:join(Root, "*.{kvc,tmp}")))
    after
        ok = file:del_dir_r(Root)
    end.

%% Runs something with this process as a log handler.
with_log(Fun) ->
    #{level := Level} = logger:get_primary_config(),
    ok = logger:set_primary_config(level, info),
    ok = logger:add_handler(?MODULE, ?MODULE, #{config => #{to => self()}}),
    %% Nothing of it on the terminal.
    {ok, #{level := Default}} = logger:get_handler_config(default),
    ok = logger:set_handler_config(default, level, none),
    try
        Fun()
    after
        ok = logger:set_handler_config(default, level, Default),
        ok = logger:remove_handler(?MODULE),
        ok = logger:set_primary_config(level, Level)
    end.

log(#{level := Level, msg := {report, Report}, meta := #{application := erllama_cache_nif}},
    #{config := #{to := To}}) ->
    To ! {logged, Level, Report};
log(_Event, _Config) ->
    ok.

logged(Name, Level, Check) ->
    receive
        {logged, Level, #{event := Name} = Event} ->
            Check(Event),
            Event
    after 0 -> error({not_logged, Name, Level})
    end.

nothing_logged() ->
    receive
        {logged, _, Event} -> error({logged, Event})
    after 0 -> ok
    end.

%% No documented reason is told as the system's unknown error.
format_error_test_() ->
    Reasons = [
        max_concurrent, weight_exceeds_limit, cancelled, already_present, conflict, expired,
        prefix_too_long, {missing_key, tokens}, {invalid_meta, tokens},
        {read_back, content_mismatch}, {corrupt, crc_mismatch}, {corrupt, not_regular},
        unauthenticated, {wrong_tier, disk}, exceeds_max_bytes, no_room, {mac_key, bad_key},
        {mac_key, raised}, {mac_key, enoent}, {errno, 5000}, badarg, enospc, eio, enoent, emfile,
        {error, eio}, out_of_turn
    ],
    [
        fun() ->
            Text = ?WRITER:format_error(Reason),
            ?assert(io_lib:printable_unicode_list(Text)),
            ?assertEqual(nomatch, string:find(Text, "unknown"))
        end
     || Reason <- Reasons
    ] ++
        [
            ?_assertEqual("no space left on device", ?WRITER:format_error(enospc)),
            ?_assertEqual("the file is corrupt: crc mismatch",
                          ?WRITER:format_error({error, {corrupt, crc_mismatch}})),
            ?_assertEqual("{what,[1]}", ?WRITER:format_error({what, [1]}))
        ].
