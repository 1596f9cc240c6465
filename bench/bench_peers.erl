%% Saves and loads of a real model's state beside those of others, on the same bytes, in one
%% directory and in turns: `make bench-peers'. llama.cpp, the model and Python are in $LLM
%% (examples/llm/fetch.sh).
%%
%% The state is what llama.cpp writes for a prompt of so many tokens ($BENCH_TOKENS, with commas).
%% For the others its file's bytes are the payload, at hand in memory; llama.cpp itself takes them
%% from the model's context and puts them back there, and how long that takes is what its save and
%% load in memory, in $BENCH_RAM, show.
-module(bench_peers).

-export([main/0]).

-import(bench_turns, [new_root/2, size_name/1, timed/1]).
-import(bench_sides, [meta/1, fresh/0, remove/2, with_store/3]).

-define(STORE, bench_store).
-define(ROUNDS, 15).
%% Milliseconds: a long prompt takes a processor a minute.
-define(PATIENCE, 600000).

-type peer() :: this | llama | llama_in_memory | safetensors | numpy.

main() ->
    bench_report:main(peers, fun run/0).

run() ->
    {ok, _} = erllama_cache_writer:start_link(#{host => erllama_cache_store}),
    {ok, _} = plain_semaphore:start_link(1),
    Fetched = os:getenv("LLM"),
    Llama = llm:open(Fetched),
    Python = open(filename:join([Fetched, "python", "bin", "python"]), ["bench/peers/files.py"]),
    Disk = new_root("BENCH_DISK", "/tmp"),
    Ram = new_root("BENCH_RAM", "/dev/shm"),
    try
        Rows = [{Tokens, measured(Tokens, Llama, Python, Disk, Ram)} || Tokens <- prompts()],
        {[], #{peers => maps:from_list(Rows)}}
    after
        [file:del_dir_r(Root) || Root <- [Disk, Ram]]
    end.

prompts() ->
    [list_to_integer(N) || N <- string:lexemes(os:getenv("BENCH_TOKENS", "256,2048,8000"), ",")].

measured(Tokens, Llama, Python, Disk, Ram) ->
    Prompt = llm:tokens(Llama, Tokens, filename:join("docs", "durability.md")),
    ok = llm:forget(Llama),
    Prefill = llm:read(Llama, Prompt) div 1000000,
    File = path(Ram, "state"),
    _ = llm:save_file(Llama, File),
    {ok, Payload} = file:read_file(File),
    _ = ask(Python, ["state ", File]),
    Others = #{llama => {in_llama(Llama), Disk}, llama_in_memory => {in_llama(Llama), Ram},
               safetensors => {in_python(Python, "safetensors "), Disk},
               numpy => {in_python(Python, "numpy "), Disk}},
    Rounds = with_store(Disk, disk, fun() ->
        [round(Round, Payload, Others, Disk) || Round <- lists:seq(0, ?ROUNDS)]
    end),
    %% The first warms up.
    Summaries = maps:map(fun(_Peer, Of) -> summaries(Of) end, by_peer(tl(Rounds))),
    say(Tokens, byte_size(Payload), Prefill, Summaries),
    Summaries#{bytes => byte_size(Payload), prefill_ms => Prefill}.

round(Round, Payload, Others, Disk) ->
    Peers = [this | lists:sort(maps:keys(Others))],
    Rotated = lists:nthtail(Round rem length(Peers), Peers ++ Peers),
    [{Peer, turn(Peer, Payload, Others, Disk)} || Peer <- lists:sublist(Rotated, length(Peers))].

%% A save, a sync of its file afterwards where the save makes none, and a load of what it has saved.
-spec turn(peer(), binary(), map(), binary()) ->
    {Save :: integer(), Synced :: integer(), Load :: integer()}.
turn(this, Payload, _Others, Disk) ->
    Meta = meta(fresh()),
    {Save, {ok, Key}} = timed(fun() ->
        erllama_cache_writer:save(?STORE, disk, Meta, Payload)
    end),
    {Load, {ok, _, Loaded}} = timed(fun() -> erllama_cache_store:load(?STORE, Key) end),
    %% When the clock has stopped: it looks at each byte.
    true = Loaded =:= Payload,
    remove(Disk, Key),
    {Save, Save, Load};
turn(Peer, _Payload, Others, _Disk) ->
    #{Peer := {Ask, Root}} = Others,
    File = path(Root, "of_peer"),
    Save = Ask(save, File),
    {Sync, ok} = timed(fun() ->
        {ok, Device} = file:open(File, [read, write, raw]),
        ok = file:sync(Device),
        file:close(Device)
    end),
    Load = Ask(load, File),
    ok = file:delete(File),
    {Save, Save + Sync, Load}.

by_peer(Rounds) ->
    maps:groups_from_list(fun({Peer, _}) -> Peer end, fun({_, Times}) -> Times end,
                          lists:append(Rounds)).

summaries(Times) ->
    {Saves, Synced, Loads} = lists:unzip3(Times),
    #{save => bench_report:summary(Saves), synced => bench_report:summary(Synced),
      load => bench_report:summary(Loads)}.

say(Tokens, Bytes, Prefill, Summaries) ->
    io:format("~n~w tokens, a state of ~ts; read by the model in ~.1f s (milliseconds: p50, p99)~n",
              [Tokens, size_name(Bytes), Prefill / 1.0e3]),
    maps:foreach(
        fun(Peer, Of) ->
            io:format("  ~-16ts~ts~n", [Peer, [column(What, Of) || What <- [save, synced, load]]])
        end,
        Summaries
    ).

column(What, Of) ->
    #{What := #{p50 := P50, p99 := P99}} = Of,
    io_lib:format("   ~ts ~9.2f ~9.2f", [What, P50 / 1.0e6, P99 / 1.0e6]).

%%% Peers

in_llama(Model) ->
    fun
        (save, File) -> llm:save_file(Model, File);
        (load, File) -> llm:load_file(Model, File)
    end.

in_python(Port, BackEnd) ->
    fun(What, File) -> ask(Port, [BackEnd, atom_to_list(What), $\s, File]) end.

path(Root, Name) ->
    filename:join(Root, Name).

open(Executable, Args) ->
    Port = open_port({spawn_executable, Executable}, [{args, Args}, {line, 65536}, binary]),
    <<"ready">> = line(Port),
    Port.

ask(Port, Command) ->
    true = port_command(Port, [Command, $\n]),
    case line(Port) of
        <<"ok ", Number/binary>> -> binary_to_integer(Number);
        <<"error ", Reason/binary>> -> error({peer, iolist_to_binary(Command), Reason})
    end.

line(Port) ->
    receive
        {Port, {data, {eol, Line}}} -> Line
    after ?PATIENCE -> error({no_answer, erlang:port_info(Port, name)})
    end.
