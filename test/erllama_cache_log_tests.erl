%% The events of the log: each is reported when what it names happens, with what the page for
%% operators says of it; and what a node shows of them without anybody having configured a logger.
-module(erllama_cache_log_tests).

-include("erllama_cache_store_util.hrl").
-include_lib("eunit/include/eunit.hrl").

-import(erllama_cache_test_util, [
    temporary_dir/1, meta/1, with_log/1, file_of/2, page_tables_names/2, source/1, matches/2,
    run_node/3, meta/0
]).
-import(erllama_cache_store_util, [running_tests/2]).

-export([play/1]).

-define(WRITER, erllama_cache_writer).

log_test_() ->
    running_tests(#{slow_save_ms => 60000}, [
        fun a_slow_save_is_logged/1,
        fun a_start_is_logged/1,
        fun a_root_that_needs_names_is_logged/1,
        fun what_a_start_finds_is_logged/1,
        fun a_root_that_was_replaced_is_logged/1,
        fun an_eviction_that_fails_is_logged/1,
        fun a_successful_save_logs_nothing/1
    ]).

save(N, Payload) ->
    ?WRITER:save(?STORE, disk, meta([N]), Payload).

a_slow_save_is_logged(Root) ->
    ok = gen_server:stop(?WRITER),
    {ok, _} = ?WRITER:start_link(#{host => erllama_cache_store, slow_save_ms => 1}),
    Key = with_log(fun() ->
        {ok, Saved} = save(1, binary:copy(<<7>>, 64 bsl 20)),
        Saved
    end),
    Hex = erllama_cache_log:hex(Key),
    #{save_ms := Took} = logged(slow_save, warning, fun(Event) ->
        ?assertMatch(
            #{tier_srv := ?STORE, key := Hex, payload_bytes := 67108864, waited_ms := _}, Event
        )
    end),
    ?assert(Took >= 1),
    ?assert(filelib:is_regular(file_of(Root, Key))).

a_start_is_logged(Root) ->
    {ok, Key} = save(1, <<"payload">>),
    Size = filelib:file_size(file_of(Root, Key)),
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
    {ok, File} = file:read_file(file_of(Root, Key)),
    {Damaged, Later} = {file_of(Root, <<1:256>>), file_of(Root, <<2:256>>)},
    ok = file:write_file(Damaged, <<"damaged">>),
    ok = file:change_time(Damaged, {{2020, 1, 1}, {0, 0, 0}}),
    <<Magic:3/binary, 1, Rest/binary>> = File,
    ok = file:write_file(Later, [Magic, 3, Rest]),
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
a_root_that_was_replaced_is_logged(Root) ->
    ok = gen_server:stop(?STORE),
    Place = filename:join(Root, "place"),
    ok = file:make_dir(Place),
    with_log(fun() ->
        {ok, _} = erllama_cache_store:start_link(?STORE, #{root => Place, max_bytes => 1 bsl 20}),
        {ok, Gone} = save(1, <<"gone">>),
        ok = file:rename(Place, filename:join(Root, "moved")),
        ok = file:make_dir(Place),
        {ok, Theirs} = file:read_file(file_of(filename:join(Root, "moved"), Gone)),
        ok = file:write_file(file_of(Place, <<1:256>>), Theirs),
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
    Path = file_of(Root, Key),
    restart_logged(#{root => Root, max_bytes => filelib:file_size(Path) + 1000}),
    ok = file:delete(Path),
    ok = file:make_dir(Path),
    with_log(fun() -> {error, no_room} = save(2, Payload) end),
    logged(file_skipped, warning, fun(Event) ->
        ?assertMatch(#{store := ?STORE, file := Path, reason := _}, Event)
    end).

a_successful_save_logs_nothing(_Root) ->
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

the_pages_events_are_there_test() ->
    Named = page_tables_names("operations.md", "`event`"),
    Sources = filelib:wildcard(filename:join(filename:dirname(source(?WRITER)), "*.erl")),
    Logged = [Event || Source <- Sources, Event <- events(Source)],
    ?assertEqual(lists:usort(Logged), lists:sort(Named)).

events(Source) ->
    {ok, Code} = file:read_file(Source),
    [Event || [Event] <- matches("event => ([a-z_]+)", Code)].

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

%%% What a node prints

default_handler_test_() ->
    {timeout, 120, fun every_event_from_warning_up_is_printed/0}.

%% `store_scanned' is an info, below what a node logs unless it is told otherwise.
every_event_from_warning_up_is_printed() ->
    Root = temporary_dir(?MODULE),
    try
        %% A file that a scan removes, and one of a later version, which it skips.
        Damaged = file_of(Root, <<1:256>>),
        ok = file:write_file(Damaged, <<"not a KVC file">>),
        ok = file:change_time(Damaged, {{2020, 1, 1}, {0, 0, 0}}),
        ok = file:write_file(file_of(Root, <<2:256>>), later_version()),
        {Status, Printed} = run_node("", {?MODULE, play}, [Root]),
        ?assertEqual({0, []}, {Status, [
            Event
         || Event <- ["corrupt_file_removed", "file_skipped", "slow_save", "root_changed"],
            string:find(Printed, Event) =:= nomatch
        ]}),
        ?assertEqual(nomatch, string:find(Printed, "store_scanned")),
        %% In words, with the key as its file is called.
        {ok, Key} = erllama_cache_store:key(meta()),
        Hex = binary_to_list(erllama_cache_log:hex(Key)),
        ?assertNotEqual(nomatch, string:find(Printed, "key " ++ Hex ++ ", payload bytes 134217728"))
    after
        ok = file:del_dir_r(Root)
    end.

%% In a node of its own.
play([Root]) ->
    {ok, _} = erllama_cache_store:start_link(store, #{root => Root}),
    {ok, _} = erllama_cache_writer:start_link(#{host => erllama_cache_store, slow_save_ms => 1}),
    Payload = binary:copy(<<"0123456789abcdef">>, 8 bsl 20),
    {ok, _} = erllama_cache_writer:save(store, disk, meta(), Payload),
    ok = file:rename(Root, Root ++ ".moved"),
    ok = file:make_dir(Root),
    miss = erllama_cache_store:load(store, <<0:256>>),
    _ = sys:get_state(store),
    ok = file:del_dir_r(Root ++ ".moved"),
    %% Returns when the events have been printed.
    ok = logger_std_h:filesync(default),
    init:stop().

later_version() ->
    <<"KVC", 99, 0:((72 - 4) * 8)>>.
