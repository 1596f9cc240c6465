%% A prompt that a model reads once: `make demo-llm'. It saves the model's state, loads it again, in
%% another VM as well, and damages it.
%%
%%     -run llm_demo main cold      a first VM: reads the prompt, saves the state, loads it
%%     -run llm_demo main restart   a second one: loads what the first has saved, and damages the file
%%
%% $LLM has the model, $ROOT is the store's directory, $TOKENS the length of the prompt.
-module(llm_demo).

-export([main/1]).

-define(STORE, demo_store).
%% So many tokens are compared after each start.
-define(ANSWER, 32).
-define(PROMPT, filename:join(["docs", "durability.md"])).

main([Part]) ->
    ok = io:setopts([{encoding, unicode}]),
    try
        {ok, _} = erllama_cache_store:start_link(?STORE, #{root => root()}),
        {ok, _} = erllama_cache_writer:start_link(#{host => erllama_cache_store}),
        Directory = os:getenv("LLM"),
        Model = llm:open(Directory),
        Prompt = llm:tokens(Model, list_to_integer(os:getenv("TOKENS", "2000")), ?PROMPT),
        Meta = meta(Directory, lists:droplast(Prompt)),
        ok = part(Part, Model, Prompt, Meta),
        ok = llm:close(Model),
        halt(0)
    catch
        Class:Reason:Stack ->
            io:format(standard_error, "~n~ts~n", [erl_error:format_exception(Class, Reason, Stack)]),
            halt(1)
    end.

part("cold", Model, Prompt, Meta) ->
    head("Cold: the model reads the prompt"),
    {Cold, Answer, State} = cold(Model, Prompt),
    line("goes on", "~ts", [llm:text(Model, Answer)]),
    head("Save the state"),
    save(Meta, State),
    %% In the directory above the store's, for the second VM.
    ok = file:write_file(first_file(), term_to_binary({Cold, Answer})),
    head("Warm: the state is loaded"),
    warm(Model, Prompt, Meta, Cold, Answer);
part("restart", Model, Prompt, Meta) ->
    {ok, First} = file:read_file(first_file()),
    {Cold, Answer} = binary_to_term(First),
    head("Warm, after a restart of the VM and of the model"),
    warm(Model, Prompt, Meta, Cold, Answer),
    head("A bit of the file flips"),
    Key = damage(Meta),
    {error, Reason} = erllama_cache_store:load(?STORE, Key),
    line("load", "refused: ~tp", [Reason]),
    head("Cold again, and saved anew"),
    {_, Answer, State} = cold(Model, Prompt),
    same(Answer),
    save(Meta, State),
    {ok, _, _} = erllama_cache_store:load(?STORE, Key),
    line("load", "accepted", []).

%% The last token is not part of what is saved: the model has to read one to go on from there.
cold(Model, Prompt) ->
    ok = llm:forget(Model),
    Read = llm:read(Model, lists:droplast(Prompt)),
    {Packed, State} = timed(fun() -> llm:state(Model) end),
    {First, Answer} = llm:go_on(Model, lists:last(Prompt), ?ANSWER),
    line("prompt", "~b tokens, of ~ts", [length(Prompt), ?PROMPT]),
    line("read", "~ts", [time(Read)]),
    line("first token", "after ~ts", [time(Read + First)]),
    line("state", "~.1f MB, which llama.cpp hands over in ~ts",
         [byte_size(State) / 1.0e6, time(Packed)]),
    {Read + First, Answer, State}.

save(Meta, State) ->
    {Saved, {ok, Key}} = timed(fun() -> erllama_cache_store:save(?STORE, Meta, State) end),
    line("saved", "in ~ts: synced, read back, published", [time(Saved)]),
    line("key", "~ts", [hex(Key)]).

warm(Model, Prompt, Meta, Cold, Answer) ->
    ok = llm:forget(Model),
    Asked = Meta#{tokens := Prompt},
    {Loaded, {ok, Info, State}} = timed(fun() ->
        {ok, Key, Length} = erllama_cache_store:longest_prefix(?STORE, Asked),
        Length = length(Prompt) - 1,
        erllama_cache_store:load(?STORE, Key)
    end),
    {Restored, ok} = timed(fun() -> llm:restore(Model, State) end),
    {First, Again} = llm:go_on(Model, lists:last(Prompt), ?ANSWER),
    Warm = Loaded + Restored + First,
    line("found", "the state of the prompt's first ~b tokens",
         [byte_size(maps:get(tokens, Info)) div 4]),
    line("load", "~ts: every byte checked", [time(Loaded)]),
    line("restore", "~ts, by llama.cpp", [time(Restored)]),
    line("first token", "after ~ts instead of ~ts: ~.1f times as fast",
         [time(Warm), time(Cold), Cold / Warm]),
    Again =:= Answer orelse error({other_tokens, Again, Answer}),
    same(Answer).

same(Answer) ->
    line("goes on", "with the same ~b tokens", [length(Answer)]).

damage(Meta) ->
    {ok, Key} = erllama_cache_store:key(Meta),
    File = filename:join(root(), hex(Key) ++ ".kvc"),
    {ok, Bytes} = file:read_file(File),
    At = byte_size(Bytes) div 2,
    <<Before:At/binary, Byte, After/binary>> = Bytes,
    ok = file:write_file(File, [Before, Byte bxor 1, After]),
    line("damaged", "byte ~b of ~b", [At, byte_size(Bytes)]),
    Key.

%% What makes the key, and so has to differ where states must not be mixed up: the model by its
%% file, the parameters by all that the context was made with.
meta(Directory, Tokens) ->
    #{
        save_reason => cold,
        quant_bits => 4,
        quant_type => q4_k_m,
        fingerprint => llm:fingerprint(Directory),
        fingerprint_mode => safe,
        ctx_params_hash => crypto:hash(sha256, "8192 tokens, flash attention"),
        tokens => Tokens,
        context_size => 8192
    }.

root() ->
    os:getenv("ROOT").

first_file() ->
    filename:join(filename:dirname(root()), "first").

%%% What is printed

timed(Fun) ->
    Begun = erlang:monotonic_time(nanosecond),
    Result = Fun(),
    {erlang:monotonic_time(nanosecond) - Begun, Result}.

time(Nanoseconds) when Nanoseconds >= 1000000000 ->
    io_lib:format("~.2f s", [Nanoseconds / 1.0e9]);
time(Nanoseconds) ->
    io_lib:format("~.1f ms", [Nanoseconds / 1.0e6]).

hex(Key) -> string:lowercase(binary_to_list(binary:encode_hex(Key))).

head(Title) -> io:format("~n~ts~n", [Title]).

line(Name, Format, Args) ->
    io:format("  ~-13s" ++ Format ++ "~n", [Name | Args]).
