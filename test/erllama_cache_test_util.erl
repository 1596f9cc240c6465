%% What several suites need: directories, metadata, processes that do as they are told, and waiting
%% without sleeping for a guessed time.
-module(erllama_cache_test_util).

-export([each/3, in_project/1, fresh_dir/2, temporary_dir/1]).
-export([files/1, open_files/1, file_of/2, mode/1]).
-export([patch/3, flip/2, flip/3]).
-export([meta/0, meta/1]).
-export([page/1, page_tables_names/2, source/1, matches/2]).
-export([silence/0, unsilence/1, with_log/1, logged/1, log/2]).
-export([eventually/1, eventually/2, next_millisecond/0]).
-export([actor/0, actor/1, ask/2, tell/2, answer/2, kill/1, stop/1, own_messages/0]).
-export([run_command/2, run_node/3]).

-include_lib("kernel/include/file.hrl").
-include_lib("stdlib/include/assert.hrl").

%% Nothing that is waited for takes this long; what does is an error, not a slow machine.
-define(DEADLINE, 20000).
-define(POLL_EVERY, 2).

%%% EUnit

%% These tests, each with what `Setup' returns as its argument and under its function's name. With
%% EUNIT_CASE= in the environment, only the one of this name.
-spec each(fun(() -> State), fun((State) -> term()), [fun((State) -> term())]) -> tuple().
each(Setup, Teardown, Tests) ->
    Case = os:getenv("EUNIT_CASE"),
    {foreach, Setup, Teardown, [
        %% Minutes are for disks that others are busy with: no test waits for a time to pass.
        fun(State) -> {timeout, 300, {with, State, [Test]}} end
     || Test <- Tests, Case =:= false orelse is_named(Case, Test)
    ]}.

%% `fun a/1' is named `a' or, by some releases, `-fun.a/1-'.
is_named(Case, Test) ->
    {name, Name} = erlang:fun_info(Test, name),
    re:run(atom_to_list(Name), ["(^|[.])", Case, "(/|$)"]) =/= nomatch.

%%% Files

%% A file of the project, by its path from there.
-spec in_project(file:filename()) -> file:filename().
in_project(Path) ->
    filename:join(filename:dirname(filename:dirname(source(erllama_cache_writer))), Path).

%% A new, empty directory of this name in a suite's own.
-spec fresh_dir(atom() | string(), list()) -> file:filename().
fresh_dir(Name, Config) ->
    Unique = lists:concat([Name, "_", erlang:unique_integer([positive])]),
    Dir = filename:join(proplists:get_value(priv_dir, Config), Unique),
    ok = file:make_dir(Dir),
    Dir.

%% A new, empty directory whose name begins with this one: the caller's, to remove it.
-spec temporary_dir(atom()) -> file:filename().
temporary_dir(Name) ->
    Unique = lists:concat([Name, "_", os:getpid(), "_", erlang:unique_integer([positive])]),
    Dir = filename:join(os:getenv("TMPDIR", "/tmp"), Unique),
    ok = file:make_dir(Dir),
    Dir.

%% The names in a directory.
-spec files(file:name_all()) -> [file:filename_all()].
files(Dir) ->
    {ok, Names} = file:list_dir_all(Dir),
    lists:sort(Names).

%% What this node has open in a directory, and the directory itself: a temporary file without a
%% name shows nowhere else. Empty where there is no /proc.
-spec open_files(file:filename()) -> [file:filename_all()].
open_files(Dir) ->
    [
        Path
     || Descriptor <- filelib:wildcard("/proc/self/fd/*"),
        {ok, Path} <- [file:read_link_all(Descriptor)],
        string:prefix(Path, Dir) =/= nomatch
    ].

%% Where a key's file stands, as a string or a binary like the root.
-spec file_of(file:name_all(), binary()) -> file:filename_all().
file_of(Root, Key) ->
    Hex = string:lowercase(binary_to_list(binary:encode_hex(Key))),
    filename:join(Root, Hex ++ ".kvc").

%% The permissions of a file.
-spec mode(file:name_all()) -> non_neg_integer().
mode(Path) ->
    {ok, #file_info{mode = Mode}} = file:read_file_info(Path),
    Mode band 8#777.

%%% Bytes

%% Puts other bytes in the place of those that begin at `Offset'.
-spec patch(binary(), non_neg_integer(), binary()) -> binary().
patch(File, Offset, Bytes) ->
    Size = byte_size(Bytes),
    <<Before:Offset/binary, _:Size/binary, After/binary>> = File,
    <<Before/binary, Bytes/binary, After/binary>>.

%% Turns the lowest bit of a byte over.
-spec flip(binary(), non_neg_integer()) -> binary().
flip(File, Offset) ->
    flip(File, Offset, 0).

-spec flip(binary(), non_neg_integer(), Bit :: 0..7) -> binary().
flip(File, Offset, Bit) ->
    patch(File, Offset, <<(binary:at(File, Offset) bxor (1 bsl Bit))>>).

%%% Metadata

%% A build_meta map with what is required, and nothing else.
-spec meta() -> erllama_cache_meta:build_meta().
meta() ->
    #{
        save_reason => cold,
        quant_bits => 4,
        fingerprint => binary:copy(<<16#a5>>, 32),
        fingerprint_mode => safe,
        quant_type => q4_k_m,
        ctx_params_hash => binary:copy(<<16#5a>>, 32),
        tokens => [1, 15043, 3186, 16#ffffffff],
        context_size => 4096
    }.

%% The same with other tokens, and so with another key.
-spec meta([integer()]) -> erllama_cache_meta:build_meta().
meta(Tokens) ->
    (meta())#{tokens := Tokens}.

%%% Pages and sources

%% Where the page of this name stands, below docs/.
-spec page(string()) -> file:filename().
page(Name) ->
    [Page] = filelib:wildcard(in_project("docs/**/" ++ Name)),
    Page.

%% What the first cells of a table of a page have in backticks. The table is chosen by how its head
%% begins.
-spec page_tables_names(string(), string()) -> [binary()].
page_tables_names(Name, Head) ->
    {ok, Text} = file:read_file(page(Name)),
    [Rows] = lists:append(matches(["^\\| ", Head, ".*\n\\|[-|]+\n((?:\\|.*\n)+)"], Text)),
    [
        InBackticks
     || [Cell] <- matches("^\\| (.*?) \\|", Rows), [InBackticks] <- matches("`([a-z_]+)`", Cell)
    ].

%% The file that a module was compiled from.
-spec source(module()) -> file:filename().
source(Module) ->
    proplists:get_value(source, Module:module_info(compile)).

%% What the groups of a pattern match, for each of its matches.
-spec matches(iodata(), iodata()) -> [[binary()]].
matches(Pattern, Text) ->
    case re:run(Text, Pattern, [global, multiline, unicode, {capture, all_but_first, binary}]) of
        {match, Matches} -> Matches;
        nomatch -> []
    end.

%%% The log

%% Keeps what a test provokes off the terminal, until unsilence/1.
-spec silence() -> logger:level() | all | none.
silence() ->
    {ok, #{level := Level}} = logger:get_handler_config(default),
    ok = logger:set_handler_config(default, level, none),
    Level.

-spec unsilence(logger:level() | all | none) -> ok.
unsilence(Level) ->
    logger:set_handler_config(default, level, Level).

%% Runs `Fun'. Each event that the application logs meanwhile, from info up, comes to the caller as
%% `{logged, Level, Report}'; none goes to the terminal.
-spec with_log(fun(() -> Result)) -> Result.
with_log(Fun) ->
    #{level := Primary} = logger:get_primary_config(),
    ok = logger:set_primary_config(level, info),
    ok = logger:add_handler(?MODULE, ?MODULE, #{config => #{to => self()}}),
    Default = silence(),
    try
        Fun()
    after
        ok = unsilence(Default),
        ok = logger:remove_handler(?MODULE),
        ok = logger:set_primary_config(level, Primary)
    end.

%% The reports that are logged while a function runs, the first one first.
-spec logged(fun(() -> term())) -> [logger:report()].
logged(Fun) ->
    _ = with_log(Fun),
    reports().

reports() ->
    receive
        {logged, _Level, Report} -> [Report | reports()]
    after 0 -> []
    end.

%% As a handler of the logger.
-spec log(logger:log_event(), logger:handler_config()) -> ok.
log(#{level := Level, msg := {report, Report}, meta := #{application := erllama_cache_nif}},
    #{config := #{to := To}}) ->
    To ! {logged, Level, Report},
    ok;
log(_Event, _Config) ->
    ok.

%%% Waiting

%% Waits until `Fun' returns true.
-spec eventually(fun(() -> boolean())) -> ok.
eventually(Fun) ->
    eventually(Fun, ?DEADLINE).

%% The same, for at most so many milliseconds.
-spec eventually(fun(() -> boolean()), non_neg_integer()) -> ok.
eventually(Fun, Timeout) ->
    poll(Fun, erlang:monotonic_time(millisecond) + Timeout).

poll(Fun, Deadline) ->
    case Fun() of
        true ->
            ok;
        false ->
            ?assert(erlang:monotonic_time(millisecond) < Deadline),
            receive
            after ?POLL_EVERY -> poll(Fun, Deadline)
            end
    end.

%% Last uses are compared by the millisecond: what comes after this is later than what was before.
-spec next_millisecond() -> ok.
next_millisecond() ->
    after_millisecond(erlang:system_time(millisecond)).

after_millisecond(Now) ->
    case erlang:system_time(millisecond) of
        Now -> after_millisecond(Now);
        _Later -> ok
    end.

%%% Processes that do as they are told

%% A process that runs the funs that it is sent, for as long as the calling one lives. It is not
%% linked, so that it can be killed.
-spec actor() -> pid().
actor() ->
    actor([]).

%% The same with options as for spawn_opt/2.
-spec actor([proc_lib:spawn_option()]) -> pid().
actor(Options) ->
    Director = self(),
    spawn_opt(fun() -> act(monitor(process, Director)) end, Options).

act(Director) ->
    receive
        {'DOWN', Director, process, _, _} ->
            ok;
        {do, Fun, From, Ref} ->
            Outcome =
                try
                    {returned, Fun()}
                catch
                    Class:Reason -> {Class, Reason}
                end,
            From ! {Ref, Outcome},
            act(Director)
    end.

%% The messages that the calling process has not received, and still has not afterwards. Asked for
%% its own, process_info/2 of OTP 25 leaves out what came while a call of a NIF was under way.
-spec own_messages() -> [term()].
own_messages() ->
    Messages = take_messages(),
    [self() ! Message || Message <- Messages].

take_messages() ->
    receive
        Message -> [Message | take_messages()]
    after 0 -> []
    end.

%% What `Fun' returns in that process; raises what it raises there.
-spec ask(pid(), fun(() -> Result)) -> Result.
ask(Actor, Fun) ->
    answer(Actor, tell(Actor, Fun)).

%% Begins to run `Fun' there: see answer/2.
-spec tell(pid(), fun(() -> term())) -> reference().
tell(Actor, Fun) ->
    Ref = make_ref(),
    Actor ! {do, Fun, self(), Ref},
    Ref.

%% Waits for what was begun there.
-spec answer(pid(), reference()) -> term().
answer(Actor, Ref) ->
    Monitor = monitor(process, Actor),
    receive
        {Ref, Outcome} ->
            demonitor(Monitor, [flush]),
            case Outcome of
                {returned, Result} -> Result;
                {Class, Reason} -> erlang:raise(Class, Reason, [])
            end;
        {'DOWN', Monitor, process, Actor, Reason} ->
            error({actor_died, Reason})
    after ?DEADLINE ->
        error({no_answer, erlang:process_info(Actor, current_stacktrace)})
    end.

%% Kills a process and waits until it is dead.
-spec kill(pid()) -> ok.
kill(Pid) ->
    Monitor = monitor(process, Pid),
    exit(Pid, kill),
    receive
        {'DOWN', Monitor, process, Pid, _} -> ok
    after ?DEADLINE ->
        error(still_alive)
    end.

%% Stops a server, if it runs. One that is linked to the caller or to another process may end with
%% that meanwhile.
-spec stop(atom()) -> ok.
stop(Name) ->
    case whereis(Name) of
        undefined ->
            ok;
        Pid ->
            true = unlink(Pid),
            try
                gen_server:stop(Pid)
            catch
                exit:noproc -> ok;
                exit:{_, {sys, terminate, _}} -> ok
            end
    end.

%%% Commands

%% Runs a program and waits for its end; its output includes what it says on stderr.
-spec run_command(string(), [string() | binary()]) ->
    {ExitStatus :: non_neg_integer(), Output :: string()} | not_found.
run_command(Name, Args) ->
    case os:find_executable(Name) of
        false ->
            not_found;
        Path ->
            Options = [{args, Args}, exit_status, stderr_to_stdout, hide],
            output(open_port({spawn_executable, Path}, Options), [])
    end.

%% Runs an exported function of a test module in a node of its own, one that nobody has configured,
%% with these arguments, and waits for its end. `Limits' are commands for the shell that starts it.
-spec run_node(string(), {module(), atom()}, [string()]) ->
    {ExitStatus :: non_neg_integer(), Output :: string()}.
run_node(Limits, {Module, Function}, Args) ->
    Command = [
        "erl", "-noinput", "-pa", ebin(erllama_cache_store), "-pa", ebin(Module),
        "-run", atom_to_list(Module), atom_to_list(Function) | Args
    ],
    Quoted = lists:join($\s, [[$', Word, $'] || Word <- Command]),
    {_, _} = run_command("sh", ["-c", lists:flatten([Limits, " exec ", Quoted])]).

%% Under coverage a module comes from no file.
ebin(Module) ->
    case code:which(Module) of
        cover_compiled -> filename:join(code:lib_dir(erllama_cache_nif), "ebin");
        Path -> filename:dirname(Path)
    end.

output(Port, Sofar) ->
    receive
        {Port, {data, Data}} -> output(Port, [Sofar | Data]);
        {Port, {exit_status, Status}} -> {Status, lists:flatten(Sofar)}
    after ?DEADLINE ->
        error({no_end, Port, lists:flatten(Sofar)})
    end.
