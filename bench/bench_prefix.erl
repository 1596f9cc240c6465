%% The longest stored prefix of a prompt of 32,768 tokens, in a store of 100,000 files:
%% `make bench-prefix'. The call is the public one, erllama_cache_store:longest_prefix/2. The files
%% are rows of the index, since the call reads no file. They have 16, 256 or 4096 different lengths,
%% and the one that is found is of the shortest, so that every length is hashed and looked up.
-module(bench_prefix).

-export([main/0]).

-define(STORE, prefix_store).
-define(FILES, 100000).
-define(TOKENS, 32768).
-define(LENGTHS, [16, 256, 4096]).
-define(ROUNDS, 500).
%% Bytes of a token in what is hashed.
-define(TOKEN_BYTES, 4).

main() ->
    bench_report:main(prefix, fun run/0).

run() ->
    Tokens = [rand:uniform(128000) || _ <- lists:seq(1, ?TOKENS)],
    Rows = [{Count, in_store(fun() -> measure(Count, Tokens) end)} || Count <- ?LENGTHS],
    io:format("~nlongest_prefix/2, ~w files, ~w tokens (microseconds: p50, p99; parts, p50)~n",
              [bench_report:large(?FILES), ?TOKENS]),
    [say(Row) || Row <- Rows],
    #{whole := #{p50 := Sixteen}} = proplists:get_value(16, Rows),
    {
        [{sixteen, Sixteen / 1.0e6}],
        #{prefix_ns => maps:from_list(Rows), files => bench_report:large(?FILES),
          tokens => ?TOKENS}
    }.

say({Count, #{whole := #{p50 := P50, p99 := P99}} = Row}) ->
    Parts = [io_lib:format("~w ~.1f", [Part, map_get(p50, map_get(Part, Row)) / 1.0e3])
             || Part <- parts()],
    io:format("  ~5w lengths  ~9.1f ~9.1f   ~ts~n",
              [Count, P50 / 1.0e3, P99 / 1.0e3, lists:join(", ", Parts)]).

parts() ->
    [encode, lengths, hash, look_up].

in_store(Fun) ->
    Root = filename:join("/tmp", "erllama_cache_bench." ++ os:getpid()),
    ok = filelib:ensure_dir(filename:join(Root, "x")),
    {ok, Store} = erllama_cache_store:start_link(?STORE, #{root => Root}),
    try
        Fun()
    after
        ok = gen_server:stop(Store),
        ok = file:del_dir_r(Root)
    end.

measure(Count, Tokens) ->
    Step = ?TOKENS div Count,
    Lengths = [N * Step || N <- lists:seq(1, Count)],
    fill(bench_report:large(?FILES) - 1, list_to_tuple(Lengths)),
    Meta = meta(Tokens),
    {ok, Key} = erllama_cache_store:key(meta(lists:sublist(Tokens, Step))),
    add(Key, Step),
    {ok, Key, Step} = erllama_cache_store:longest_prefix(?STORE, Meta),
    %% In a process of its own: the prompt is on its heap, and nothing else.
    {_, Monitor} = spawn_monitor(fun() -> exit({rounds, rounds(Meta, Tokens)}) end),
    Rounds = receive {'DOWN', Monitor, process, _, {rounds, Each}} -> Each end,
    maps:from_list([
        {Part, bench_report:summary([proplists:get_value(Part, Round) || Round <- Rounds])}
     || Part <- [whole | parts()]
    ]).

rounds(Meta, Tokens) ->
    [Round || _ <- lists:seq(1, ?ROUNDS), Round <- [one(Meta, Tokens)]].

%% The public call, and then what it does, one after another.
one(#{fingerprint := Fingerprint, ctx_params_hash := CtxParamsHash} = Meta, Tokens) ->
    {Whole, {ok, Key, _}} = timed(fun() ->
        erllama_cache_store:longest_prefix(?STORE, Meta)
    end),
    {Encode, Encoded} = timed(fun() -> erllama_cache_nif:encode_tokens(Tokens) end),
    {Lengths, All} = timed(fun() ->
        [Length * ?TOKEN_BYTES || Length <- erllama_cache_index:lengths(?STORE, tokens, ?TOKENS)]
    end),
    QuantByte = erllama_cache_nif:quant_byte(f16),
    {Hash, Keys} = timed(fun() ->
        erllama_cache_nif:prefix_keys_of_many(Fingerprint, QuantByte, CtxParamsHash, Encoded, All)
    end),
    Each = lists:reverse([One || <<One:32/binary>> <= Keys]),
    {LookUp, Key} = timed(fun() -> first(Each) end),
    [{whole, Whole}, {encode, Encode}, {lengths, Lengths}, {hash, Hash}, {look_up, LookUp}].

first([Key | Others]) ->
    case erllama_cache_index:row(?STORE, Key) of
        none -> first(Others);
        _ -> Key
    end.

timed(Fun) ->
    Begun = erlang:monotonic_time(nanosecond),
    Result = Fun(),
    {erlang:monotonic_time(nanosecond) - Begun, Result}.

fill(Files, Lengths) ->
    [add(rand:bytes(32), element(1 + N rem tuple_size(Lengths), Lengths))
     || N <- lists:seq(1, Files)],
    ok.

add(Key, Length) ->
    Row = erllama_cache_index:file(Key, {tokens, Length}, 1, 0, make_ref()),
    true = erllama_cache_index:add(?STORE, Row).

meta(Tokens) ->
    #{fingerprint => <<1:256>>, quant_type => f16, ctx_params_hash => <<2:256>>, tokens => Tokens}.
