%% What several suites need: directories, metadata, processes that do as they are told, and waiting
%% without sleeping for a guessed time.
-module(erllama_cache_test_util).

-export([in_project/1, fresh_dir/2, files/1, open_files/1, file_of/2]).
-export([meta/0, meta/1]).
-export([eventually/1, eventually/2]).
-export([actor/0, actor/1, ask/2, tell/2, answer/2, kill/1, stop/1, own_messages/0]).
-export([run_command/2, run_node/3]).

-include_lib("stdlib/include/assert.hrl").

%% Nothing that is waited for takes this long; what does is an error, not a slow machine.
-define(DEADLINE, 20000).
-define(POLL_EVERY, 2).

%%% Files

%% A file of the project, by its path from there.
-spec in_project(file:filename()) -> file:filename().
in_project(Path) ->
    Source = proplists:get_value(source, erllama_cache_writer:module_info(compile)),
    filename:join(filename:dirname(filename:dirname(Source)), Path).

%% A new, empty directory of this name in a suite's own.
-spec fresh_dir(atom() | string(), list()) -> file:filename().
fresh_dir(Name, Config) ->
    Unique = lists:concat([Name, "_", erlang:unique_integer([positive])]),
    Dir = filename:join(proplists:get_value(priv_dir, Config), Unique),
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
