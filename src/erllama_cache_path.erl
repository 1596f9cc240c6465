%% Paths: a root in the system's encoding, and a key's file in it.
%%
%% @private
-module(erllama_cache_path).

-export([native/1, absolute/1, final/2]).
-export_type([unusable/0]).

-type unusable() :: badarg | {unencodable, latin1 | utf8}.
%% Not a path, or one with a NUL; or one with characters that this emulator's encoding of file names
%% lacks.

%% A root in the system's encoding. A binary is a raw path already; a string is encoded as the
%% emulator encodes file names.
-spec native(file:name_all()) -> {ok, erllama_cache_nif:root()} | {error, unusable()}.
native(Root) when is_binary(Root) ->
    without_nul(Root);
native(Root) when is_list(Root) ->
    Encoding = file:native_name_encoding(),
    try unicode:characters_to_binary(Root, unicode, Encoding) of
        Path when is_binary(Path) -> without_nul(Path);
        _Unencodable -> {error, {unencodable, Encoding}}
    catch
        error:badarg -> {error, badarg}
    end;
native(_Root) ->
    {error, badarg}.

without_nul(Path) ->
    case binary:match(Path, <<0>>) of
        nomatch -> {ok, Path};
        _ -> {error, badarg}
    end.

%% A root made absolute, so that it does not depend on the node's current directory, and the same in
%% the system's encoding. An empty name stays empty: it does not mean the current directory.
-spec absolute(file:name_all()) ->
    {ok, file:name_all(), erllama_cache_nif:root()} | {error, unusable() | file:posix()}.
absolute(Root) ->
    case native(Root) of
        {ok, <<>>} -> {ok, Root, <<>>};
        {ok, <<"/", _/binary>> = Path} -> {ok, Root, Path};
        {ok, _Relative} -> below_current(Root);
        {error, _} = Error -> Error
    end.

below_current(Root) ->
    case file:get_cwd() of
        {ok, Current} ->
            Absolute = filename:absname(Root, Current),
            case native(Absolute) of
                {ok, Path} -> {ok, Absolute, Path};
                {error, _} = Error -> Error
            end;
        {error, _} = Error ->
            Error
    end.

%% The path of a key's file, a string or a binary like the root.
-spec final(file:name_all(), erllama_cache_nif:key()) -> file:filename_all().
final(Root, Key) when is_binary(Root), binary_part(Root, byte_size(Root), -1) =/= <<"/">> ->
    <<Root/binary, $/, <<<<(hex(Nibble))>> || <<Nibble:4>> <= Key>>/binary, ".kvc">>;
final(Root, Key) ->
    %% A string, since joining with a binary would make it one.
    filename:join(Root, [hex(Nibble) || <<Nibble:4>> <= Key] ++ ".kvc").

hex(Nibble) when Nibble < 10 -> $0 + Nibble;
hex(Nibble) -> $a + Nibble - 10.
