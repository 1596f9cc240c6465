%% A language model in llama.cpp, behind a port: it reads a prompt, goes on from it, and gives its
%% state as a binary and takes it back.
%%
%% ```
%% Model = llm:open(os:getenv("LLM")),
%% Prompt = llm:tokens(Model, 2000, "README.md"),
%% _Nanoseconds = llm:read(Model, lists:droplast(Prompt)),
%% State = llm:state(Model),
%% {_UntilTheFirst, Tokens} = llm:go_on(Model, lists:last(Prompt), 16),
%% ok = llm:forget(Model),
%% ok = llm:restore(Model, State),
%% {_, Tokens} = llm:go_on(Model, lists:last(Prompt), 16),
%% ok = llm:close(Model).
%% '''
%%
%% The process that opens a model is the one that uses it. Whatever the model refuses is raised.
-module(llm).

-export([open/1, close/1, tokens/3, text/2, forget/1, read/2, go_on/3, state/1, restore/2]).
-export([fingerprint/1, save_file/2, load_file/2]).
-export_type([model/0, tokens/0]).

-opaque model() :: port().
-type tokens() :: [non_neg_integer(), ...].

%% How long an answer may take, in milliseconds: a long prompt takes a processor a minute.
-define(PATIENCE, 600000).
%% Of a line there is no more in one message of the port's.
-define(LONGEST_LINE, 65536).

%% Starts llama.cpp with the model, which examples/llm/fetch.sh has put into this directory.
-spec open(file:filename()) -> model().
open(Directory) ->
    Node = os:find_executable("node"),
    Node =/= false orelse error(no_node),
    Script = filename:join(["examples", "llm", "llama.mjs"]),
    Args = [Script, Directory, model_file(Directory)],
    Options = [{args, Args}, {line, ?LONGEST_LINE}, binary, exit_status],
    Port = open_port({spawn_executable, Node}, Options),
    <<"ready">> = line(Port),
    Port.

model_file(Directory) ->
    filename:join(Directory, "model.gguf").

-spec close(model()) -> ok.
close(Model) ->
    true = port_close(Model),
    ok.

%% What tells this model from another: the SHA-256 of its file, as `fingerprint' of a key.
-spec fingerprint(file:filename()) -> <<_:256>>.
fingerprint(Directory) ->
    {ok, File} = file:open(model_file(Directory), [read, raw, binary]),
    try
        hash(File, crypto:hash_init(sha256))
    after
        file:close(File)
    end.

hash(File, Hash) ->
    case file:read(File, 1048576) of
        {ok, Bytes} -> hash(File, crypto:hash_update(Hash, Bytes));
        eof -> crypto:hash_final(Hash)
    end.

%% The first tokens of a text file.
-spec tokens(model(), Count :: pos_integer(), file:filename()) -> tokens().
tokens(Model, Count, TextFile) ->
    integers(ask(Model, ["tokens ", integer_to_list(Count), $\s, TextFile])).

%% What tokens say, quoted.
-spec text(model(), tokens()) -> binary().
text(Model, Tokens) ->
    ask(Model, ["text ", listed(Tokens)]).

%% Empties the model's sequence.
-spec forget(model()) -> ok.
forget(Model) ->
    _ = ask(Model, "forget"),
    ok.

%% Appends tokens to the sequence, and returns how many nanoseconds that took.
-spec read(model(), tokens()) -> Nanoseconds :: integer().
read(Model, Tokens) ->
    binary_to_integer(ask(Model, ["read ", listed(Tokens)])).

%% Appends a token and so many that the model finds likeliest after it. The time is that until the
%% first of them.
-spec go_on(model(), Token :: non_neg_integer(), Count :: pos_integer()) ->
    {Nanoseconds :: integer(), tokens()}.
go_on(Model, Token, Count) ->
    [Nanoseconds | Tokens] = integers(ask(Model, ["go_on ", listed([Count, Token])])),
    {Nanoseconds, Tokens}.

%% The sequence's state. This build of llama.cpp gives it to files only: to one in memory, here.
-spec state(model()) -> binary().
state(Model) ->
    in_memory(fun(File) ->
        _ = save_file(Model, File),
        {ok, State} = file:read_file(File),
        State
    end).

%% Puts a state in place of the sequence.
-spec restore(model(), binary()) -> ok.
restore(Model, State) ->
    in_memory(fun(File) ->
        ok = file:write_file(File, State),
        _ = load_file(Model, File),
        ok
    end).

in_memory(Fun) ->
    Unique = [os:getpid(), $., integer_to_list(erlang:unique_integer([positive]))],
    File = filename:join(memory(), ["llm.", Unique]),
    try
        Fun(File)
    after
        file:delete(File)
    end.

memory() ->
    Default = case filelib:is_dir("/dev/shm") of
        true -> "/dev/shm";
        false -> os:getenv("TMPDIR", "/tmp")
    end,
    os:getenv("LLM_RAM", Default).

%% llama.cpp's own way: its file, not synced, not checked. Returns the nanoseconds.
-spec save_file(model(), file:name_all()) -> Nanoseconds :: integer().
save_file(Model, File) ->
    binary_to_integer(ask(Model, ["save ", File])).

-spec load_file(model(), file:name_all()) -> Nanoseconds :: integer().
load_file(Model, File) ->
    binary_to_integer(ask(Model, ["load ", File])).

%%% The port

ask(Model, Command) ->
    true = port_command(Model, [Command, $\n]),
    case line(Model) of
        <<"ok ", Answer/binary>> -> Answer;
        <<"error ", Reason/binary>> -> error({model, Reason})
    end.

line(Port) -> line(Port, <<>>).

line(Port, Before) ->
    receive
        {Port, {data, {noeol, Part}}} -> line(Port, <<Before/binary, Part/binary>>);
        {Port, {data, {eol, Part}}} -> <<Before/binary, Part/binary>>;
        {Port, {exit_status, Status}} -> error({model_ended, Status})
    after ?PATIENCE -> error({no_answer, erlang:port_info(Port, name)})
    end.

listed(Integers) ->
    lists:join($\s, [integer_to_list(Integer) || Integer <- Integers]).

integers(Line) ->
    [binary_to_integer(Word) || Word <- binary:split(Line, <<" ">>, [global])].
