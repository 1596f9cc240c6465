%% The time to a real model's first token, cold and warm, by the length of the prompt: `make
%% bench-llm'. Cold, the model reads the prompt; warm, its state is looked up, loaded and given back
%% to it, and it reads the last token alone. llama.cpp and the model are in $LLM
%% (examples/llm/fetch.sh).
-module(bench_llm).

-export([main/0]).

-import(bench_turns, [new_root/2, size_name/1, timed/1]).

-define(STORE, bench_store).
-define(ROUNDS, 3).
%% A warm start is short.
-define(WARM_ROUNDS, 5).

main() ->
    bench_report:main(llm, fun run/0).

run() ->
    Directory = os:getenv("LLM"),
    Model = llm:open(Directory),
    Longest = llm:tokens(Model, lists:max(lengths()), filename:join("docs", "durability.md")),
    Root = new_root("BENCH_DISK", "/tmp"),
    {ok, _} = erllama_cache_writer:start_link(#{host => erllama_cache_store}),
    {ok, _} = erllama_cache_store:start_link(?STORE, #{root => Root}),
    try
        %% Nothing of what is measured first waits for pages of the model's file.
        _ = llm:read(Model, lists:sublist(Longest, 64)),
        Rows = [
            {Length, measured(Model, llm:fingerprint(Directory), lists:sublist(Longest, Length))}
         || Length <- lengths()
        ],
        {[], #{llm => maps:from_list(Rows), dup => shared(Root)}}
    after
        file:del_dir_r(Root)
    end.

%% What the states, each of which continues the one before it, share with that: kvc ($KVC) tells.
shared(Root) ->
    Report = os:cmd(lists:flatten([os:getenv("KVC"), " dup --json ", binary_to_list(Root)])),
    Numbers = [[$", Field, "\":(\\d+),?"] || Field <- ["tokens", "after", "bytes", "shared_bytes"]],
    {match, Rows} = re:run(Report, Numbers, [global, {capture, all_but_first, list}]),
    [
        #{tokens => list_to_integer(Tokens), 'after' => list_to_integer(After),
          bytes => list_to_integer(Bytes), shared => list_to_integer(Shared)}
     || [Tokens, After, Bytes, Shared] <- Rows
    ].

lengths() ->
    [list_to_integer(N) || N <- string:lexemes(os:getenv("BENCH_TOKENS", "256,512,1024,2048,4096"),
                                               ",")].

measured(Model, Fingerprint, Prompt) ->
    {Read, [Last]} = lists:split(length(Prompt) - 1, Prompt),
    Meta = meta(Fingerprint, Read),
    {Colds, [Answer]} = unzip_same([cold(Model, Read, Last) || _ <- rounds(?ROUNDS)]),
    %% The answer is in the sequence by now.
    ok = llm:forget(Model),
    _ = llm:read(Model, Read),
    State = llm:state(Model),
    {Save, {ok, _Key}} = timed(fun() -> erllama_cache_store:save(?STORE, Meta, State) end),
    {Warms, [Answer]} = unzip_same([warm(Model, Meta#{tokens := Prompt}, Last)
                                    || _ <- rounds(?WARM_ROUNDS)]),
    Summary = fun(Times) -> bench_report:summary(Times) end,
    Loads = [Load || {Load, _} <- Warms],
    Firsts = [First || {_, First} <- Warms],
    Row = #{cold := #{p50 := Cold}, warm := #{p50 := Warm}, load := #{p50 := Load}} =
        #{bytes => byte_size(State), save => Save, cold => Summary(Colds), warm => Summary(Firsts),
          load => Summary(Loads)},
    io:format("~6w tokens, a state of ~ts: first token cold after ~.2f s, warm after ~.1f ms, "
              "of which the load takes ~.2f; saved in ~.2f~n",
              [length(Prompt), size_name(byte_size(State)), Cold / 1.0e9, Warm / 1.0e6,
               Load / 1.0e6, Save / 1.0e6]),
    Row.

rounds(Rounds) ->
    lists:seq(1, bench_report:rounds(Rounds)).

unzip_same(Rounds) ->
    {Times, Answers} = lists:unzip(Rounds),
    {Times, lists:usort(Answers)}.

cold(Model, Read, Last) ->
    ok = llm:forget(Model),
    Reading = llm:read(Model, Read),
    {First, Answer} = llm:go_on(Model, Last, 1),
    {Reading + First, Answer}.

warm(Model, Meta, Last) ->
    ok = llm:forget(Model),
    {Load, {ok, _Info, State}} = timed(fun() ->
        {ok, Key, _Length} = erllama_cache_store:longest_prefix(?STORE, Meta),
        erllama_cache_store:load(?STORE, Key)
    end),
    {Restore, ok} = timed(fun() -> llm:restore(Model, State) end),
    {First, Answer} = llm:go_on(Model, Last, 1),
    {{Load, Load + Restore + First}, Answer}.

meta(Fingerprint, Tokens) ->
    #{
        save_reason => cold,
        quant_bits => 4,
        quant_type => q4_k_m,
        fingerprint => Fingerprint,
        fingerprint_mode => safe,
        ctx_params_hash => <<0:256>>,
        tokens => Tokens,
        context_size => 8192
    }.
